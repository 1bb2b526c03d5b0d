"""Choosing among results."""
