"""From a model to graphs: running it once, tracing each distinct layer on real values, keeping a graph true to it."""
