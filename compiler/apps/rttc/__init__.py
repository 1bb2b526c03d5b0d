"""Reward-guided test-time compute: answer directly, with retrieved samples, or after a short training on them."""
