"""Parts that passes are made of: edits, search, training, super-networks, lowering."""
