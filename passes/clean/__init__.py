"""Exact rewrites: the same outputs from a smaller model."""
