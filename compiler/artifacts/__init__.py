"""Folders that outlive a run: written whole, described, verified in a fresh process, compared, loaded."""
