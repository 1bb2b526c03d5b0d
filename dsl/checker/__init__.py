"""A syntax tree to a checked recipe: names, types, amounts."""
