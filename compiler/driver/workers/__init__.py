"""Code that runs in a worker: the step that is searched, at its current state, one value at a time."""
