"""Discovery of a model's structure on its graphs: residual branches, coupled channels, heads, experts."""
