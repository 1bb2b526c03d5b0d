"""Planning of a recipe from shapes alone: keys, forecasts, peaks, skeletons."""
