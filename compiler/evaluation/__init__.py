"""Clocks, references and metrics."""
