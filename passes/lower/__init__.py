"""From modules to native kernels, where these are faster."""
