"""The verbs of `effc`, and what they share: flags, the screen, the one exit path."""
