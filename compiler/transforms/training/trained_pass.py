"""Parameters of passes that train on rows: steps, learning rate, held-out data."""

from typing import Literal

from ....dsl.checker.values import DataRef, Ratio
from ...plugin.interfaces import Pass, param


class Learner(Pass):
    """Changes weights by AdamW, keeps the best of them by rows it does not learn from, and goes on after a kill."""

    steps: int = param("Updates, at most.", default=200, ge=1, unit="steps")
    lr: float = param("Largest learning rate of AdamW.", default=3e-4, gt=0)
    batch: int = param("Rows in a forward.", default=8, ge=1, unit="rows")
    accumulate: int = param("Batches whose gradients make one update.", default=1, ge=1, unit="batches")
    warmup: Ratio = param("Share of the steps over which the learning rate rises.", default=Ratio(0.05), ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = param(
        "How the learning rate falls after that.", default="cosine"
    )
    clip: float = param("Largest norm of an update's gradient.", default=1.0, gt=0)
    gradient_checkpointing: bool = param(
        "Layers run again in the backward pass: less memory, a third more time.", default=False
    )
    held_out: DataRef | None = param("Rows to judge by; never learned from.", default=None)
    every: int = param("Steps between two looks at `held_out`.", default=50, ge=1, unit="steps")
    patience: int = param("Looks without a gain after which the run ends.", default=3, ge=1, unit="looks")
    save: int = param(
        "Steps between two checkpoints, from which a killed run goes on.", default=100, ge=1, unit="steps"
    )
