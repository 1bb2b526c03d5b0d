"""Modules and functions that effc puts into a model."""
