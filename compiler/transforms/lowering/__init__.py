"""Modules on native kernels: what races for a place, what is chosen and why, and what that costs in accuracy."""
