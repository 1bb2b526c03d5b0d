"""Families of models that share their weights: what may be chosen, how a choice runs, how one is cut out."""
