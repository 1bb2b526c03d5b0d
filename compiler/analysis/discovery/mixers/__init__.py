"""State-space mixers found on the graph: their groups, heads and state."""
