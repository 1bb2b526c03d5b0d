"""Edition 1 of the language: what a recipe's first line says, what begins a statement, how deep brackets nest."""

EDITION = 1
HEADS = ("use", "param", "model", "data", "profile", "matrix", "pipeline", "expect", "emit")
DEPTH = 64  # of nested parentheses and brackets
