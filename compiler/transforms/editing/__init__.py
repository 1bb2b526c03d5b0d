"""Edits of a program by passes, and dry runs of them."""
