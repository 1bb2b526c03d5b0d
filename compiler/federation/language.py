"""A client that learns to predict the next token of its own rows."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rows.forward import nll
from ..training.objective import Objective
from ..training.schedule import RowOrder, seed_of
from ..training.trained import Trained, training
from .client import Learner, client_refuses
from .slots import Slots
from .state import State


@dataclass(frozen=True)
class Local:
    """What a client does in a round: AdamW from a fresh start, `steps` times `batch` rows, gradients cut at `clip`."""

    steps: int
    batch: int
    lr: float
    clip: float = 1.0


class Language(Learner):
    """`slots` may be shared with other clients of the process, one of whom trains at a time.

    rows, held_out   [n, length] int64; held_out may have no rows
    """

    def __init__(self, slots: Slots, rows: Tensor, held_out: Tensor, local: Local, base: str):
        self.slots, self.rows, self.held_out, self.local, self.base = slots, rows, held_out, local, base
        self.examples = len(rows)

    def drawn(self, seed: int, rank: int | None = None) -> State:
        return self.slots.drawn(seed, rank)

    def loss(self, state: State, added: State) -> float:
        if not len(self.held_out):
            return math.nan
        self.slots.put(state, added)
        nats, tokens = nll(self.slots.model, self.held_out)
        return nats / tokens

    def trained(self, state: State, names: frozenset[str], added: State, seed: int, until: float) -> State:
        self.slots.put(state, added)
        chosen = {name: p for name, p in self.slots.parameters().items() if name in names}
        model = self.slots.model
        with training(model, chosen), torch.random.fork_rng(devices=[]):
            held, order = Trained(chosen), RowOrder(len(self.rows), seed)
            optimizer = torch.optim.AdamW(held.masters.values(), lr=self.local.lr, weight_decay=0.0)
            lesson = Objective(model, self.rows)
            for step in range(self.local.steps):
                if time.monotonic() > until:
                    raise _late(step, self.local.steps)
                torch.manual_seed(seed_of("dropout", seed, step))
                lesson.learn(order.take(step * self.local.batch, self.local.batch), 1.0)
                held.collect()
                torch.nn.utils.clip_grad_norm_(held.masters.values(), self.local.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                held.spread()
        made = {name: t.float().cpu().numpy().copy() for name, t in held.tensors().items()}
        return {name: made.get(name, array) for name, array in state.items()}


def _late(step: int, steps: int) -> Exception:
    from ...dsl.diagnostics import Reject

    return Reject(
        client_refuses(
            f"the round's time was over after {step} of {steps} steps",
            help="give the round more `deadline`, or clients fewer `steps`",
        )
    )
