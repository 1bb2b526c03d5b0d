"""Weights on a grid of few values, which few bits can name."""
