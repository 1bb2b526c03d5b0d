"""Training some of a model's parameters: what is trained, on what, in which order, and how a
killed run goes on.
"""
