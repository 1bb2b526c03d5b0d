"""Steps of mixtures of experts, checked: methods of the reader of plans, which has the rest of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .engine_steps import MAX_EXPERTS, STEPS

if TYPE_CHECKING:
    from .engine_plan import _PlanReader


def read_scores_step(self: _PlanReader, step: Mapping, destination: int, width: int) -> None:
    matrix = self.retained.matrix_index(step["weight"], width, self.width(step["x"]))
    self.append_step(
        "scores", destination, x=step["x"], weight=matrix, bias=self.retained.vector_index(step["bias"], width)
    )


def read_route_step(self: _PlanReader, step: Mapping, destination: int, width: int) -> None:
    experts, count, groups, top_groups = self.width(step["x"]), step["count"], step["groups"], step["kept"]
    self.require(experts <= MAX_EXPERTS, f"it chooses among {experts} experts, and the engine takes {MAX_EXPERTS}")
    self.require(
        experts % groups == 0 and top_groups <= groups,
        f"{groups} groups of {experts} experts, {top_groups} of them kept",
    )
    each = experts // groups
    self.require(count <= top_groups * each, f"it chooses {count} of {top_groups * each} experts")
    self.require(step["judges"] <= each, f"{step['judges']} experts judge a group of {each}")
    nearest = step["kind"] == "near"
    self.require(
        not nearest or (groups == 1 and step["bias"] is None and not step["normal"]), "a part of it is not its kind's"
    )
    self.require(width == 2 * count, f"it writes {2 * count} columns, and register {destination} has {width}")
    self.require(step["eps"] >= 0, f"its `eps` is {step['eps']}")
    self.chosen[destination] = experts, count
    kind = STEPS["route"]["kind"].split().index(step["kind"])
    bias = self.retained.vector_index(step["bias"], experts)
    sizes = {"count": count, "group": groups, "block": top_groups, "stride": step["judges"]}
    rules = {"interleaved": step["normal"], "number": step["eps"], "scale": step["scale"]}
    self.append_step("route", destination, x=step["x"], kind=kind, weight=bias, **sizes, **rules)


def read_experts_step(self: _PlanReader, step: Mapping, destination: int, width: int) -> None:
    self.require(step["chosen"] in self.chosen, f"register {step['chosen']} is not what a `route` chose")
    known, count = self.chosen[step["chosen"]]
    names, x = step["weights"], self.width(step["x"])
    self.require(len(names) == known, f"it has {len(names)} weights, and its router {known} experts")
    first = self.retained.append_packed_weights_of_one_shape(names)
    n, k = self.retained.laid[first].n, self.retained.laid[first].k
    self.require(x in (k, count * k), f"its weights take {k} numbers, and register {step['x']} has {x}")
    columns = n if step["summed"] else count * n
    self.require(width == columns, f"it writes {columns} columns, and register {destination} has {width}")
    biases = -1 if step["biases"] is None else self.retained.matrix_index(step["biases"], known, n)
    sizes = {"count": known, "block": count, "stride": 0 if x == k else k, "kind": step["summed"]}
    self.append_step("experts", destination, x=step["x"], y=step["chosen"], weight=first, bias=biases, **sizes)
