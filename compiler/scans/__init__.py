"""State-space mixers: their parts, what is left without their scan, and running them on kernels."""
