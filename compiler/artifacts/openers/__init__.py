"""Files that open a folder in a fresh process: `verify_child.py` runs one by its path. See `plugin.target.Form`."""
