"""Models of effc in EleutherAI's lm-evaluation-harness."""
