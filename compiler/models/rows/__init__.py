"""A model over rows of tokens."""
