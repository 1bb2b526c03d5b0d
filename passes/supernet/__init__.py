"""Families of models that share their weights: one training, many sizes."""
