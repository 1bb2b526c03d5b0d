"""Sources of models, and kinds of data."""
