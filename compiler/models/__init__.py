"""Model folders read as untrusted input, and how a model runs over rows."""
