"""Run what the cache lacks, keep it, emit it."""
