"""Greedy search over parts of a model: candidates, prefix reuse, exact and racing choice, budgets, resume.

A pass makes pools of candidates and a budget and calls `Search.run`; what is a part is the pool's business.
"""
