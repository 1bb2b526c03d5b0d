"""Runs of recipes: the pipeline, resuming, judging, workers, and the Python API."""
