"""Steps of mixtures of experts, checked: methods of the reader of plans, which has the rest of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .engine_steps import MOST_EXPERTS, STEPS

if TYPE_CHECKING:
    from .engine_plan import _Reader


def scores(self: _Reader, step: Mapping, to: int, width: int) -> None:
    matrix = self.held.matrix(step["weight"], width, self.width(step["x"]))
    self.emit("scores", to, x=step["x"], weight=matrix, bias=self.held.vector(step["bias"], width))


def route(self: _Reader, step: Mapping, to: int, width: int) -> None:
    experts, count, groups, kept = self.width(step["x"]), step["count"], step["groups"], step["kept"]
    self.need(experts <= MOST_EXPERTS, f"it chooses among {experts} experts, and the engine takes {MOST_EXPERTS}")
    self.need(experts % groups == 0 and kept <= groups, f"{groups} groups of {experts} experts, {kept} of them kept")
    each = experts // groups
    self.need(count <= kept * each, f"it chooses {count} of {kept * each} experts")
    self.need(step["judges"] <= each, f"{step['judges']} experts judge a group of {each}")
    near = step["kind"] == "near"
    self.need(
        not near or (groups == 1 and step["bias"] is None and not step["normal"]), "a part of it is not its kind's"
    )
    self.need(width == 2 * count, f"it writes {2 * count} columns, and register {to} has {width}")
    self.need(step["eps"] >= 0, f"its `eps` is {step['eps']}")
    self.chosen[to] = experts, count
    self.emit(
        "route",
        to,
        x=step["x"],
        kind=STEPS["route"]["kind"].split().index(step["kind"]),
        weight=self.held.vector(step["bias"], experts),
        count=count,
        group=groups,
        block=kept,
        stride=step["judges"],
        interleaved=step["normal"],
        number=step["eps"],
        scale=step["scale"],
    )


def experts(self: _Reader, step: Mapping, to: int, width: int) -> None:
    self.need(step["chosen"] in self.chosen, f"register {step['chosen']} is not what a `route` chose")
    known, count = self.chosen[step["chosen"]]
    names, x = step["weights"], self.width(step["x"])
    self.need(len(names) == known, f"it has {len(names)} weights, and its router {known} experts")
    first = self.held.several(names)
    n, k = self.held.laid[first].n, self.held.laid[first].k
    self.need(x in (k, count * k), f"its weights take {k} numbers, and register {step['x']} has {x}")
    made = n if step["summed"] else count * n
    self.need(width == made, f"it writes {made} columns, and register {to} has {width}")
    biases = -1 if step["biases"] is None else self.held.matrix(step["biases"], known, n)
    self.emit(
        "experts",
        to,
        x=step["x"],
        y=step["chosen"],
        weight=first,
        bias=biases,
        kind=step["summed"],
        count=known,
        block=count,
        stride=0 if x == k else k,
    )
