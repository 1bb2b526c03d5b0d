"""Zeros in weights, which sparse kernels skip."""
