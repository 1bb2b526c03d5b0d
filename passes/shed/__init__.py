"""Mamba-Shedder and beyond: parts of state-space and hybrid models."""
