"""Training passes: recovery of what was pruned."""
