"""What a recipe will do, from shapes alone: keys, forecasts, peaks, skeletons."""
