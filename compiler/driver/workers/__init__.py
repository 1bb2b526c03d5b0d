"""What runs in a worker: the step that is searched, as far as the search has come, and one value at a time."""
