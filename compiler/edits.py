"""What was changed since the base config, as plain data."""

from dataclasses import dataclass


@dataclass
class Edits:
    """Nothing yet: filled by the rewriter."""
