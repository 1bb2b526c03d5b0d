"""Native kernels: one kernel, one pair of files."""
