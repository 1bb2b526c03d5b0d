"""Structured pruning: whole layers and branches, channels, heads."""
