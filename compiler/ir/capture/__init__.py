"""A model's forward as fx graphs: the tracer, its values, and what is traced."""
