"""Recipes of other tools, read as data and written as `.effspec`."""
