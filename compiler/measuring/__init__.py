"""Models against their originals: outputs, losses, clocks, and the bounds that a recipe states."""
