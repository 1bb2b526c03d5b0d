"""Model folders and files on disk, read as untrusted input, and models built from them."""
