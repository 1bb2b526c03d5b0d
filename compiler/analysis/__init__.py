"""Structure found on graphs, and arithmetic on shapes: what `plan` says."""
