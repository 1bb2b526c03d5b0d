"""What a model is made of, found on its graphs: residual branches, coupled channels, heads, experts."""
