"""Passes: one pass, one file. A pass never imports a pass."""
