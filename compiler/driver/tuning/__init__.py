"""`effc tune`: from a recipe whose steps are open to one that has them."""
