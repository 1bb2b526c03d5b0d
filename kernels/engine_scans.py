"""Steps that keep a state of each sequence, checked: methods of the reader of plans, which has the rest of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .engine_steps import MAX_STATES

if TYPE_CHECKING:
    from .engine_plan import _PlanReader


def emit_step_with_state(self: _PlanReader, op: str, destination: int, step: Mapping, **fields) -> None:
    self.append_step(op, destination, x=step["x"], state=self.states, **fields)
    self.states += 1


def read_convolution_step(self: _PlanReader, step: Mapping, destination: int, width: int) -> None:
    self.require(self.width(step["x"]) == width, f"registers {[step['x'], destination]} have different widths")
    filters = self.retained.matrix_index(step["filters"], None, width)
    weights = {"weight": filters, "bias": self.retained.vector_index(step["bias"], width)}
    emit_step_with_state(
        self, "convolve", destination, step, kind=step["silu"], count=self.retained.laid[filters].n, **weights
    )


def read_ssd_step(self: _PlanReader, step: Mapping, destination: int, width: int) -> None:
    heads, groups, states = (step[name] for name in ("heads", "groups", "states"))
    self.require(
        self.width(step["x"]) == width == heads * step["head_dim"] and heads % groups == 0,
        f"{heads} heads of {step['head_dim']} in {groups} groups are not {width} columns",
    )
    check_scan_operands(self, step, {"dt": heads, "b": groups * states, "c": groups * states})
    upper = math.inf if step["most"] is None else step["most"]
    self.require(0 <= step["least"] <= upper, f"its time steps are to be {step['least']} to {upper}")
    rates, skip, bias = (self.retained.vector_index(step[name], heads) for name in ("rates", "skip", "bias"))
    fields = {"y": step["dt"], "z": step["b"], "c": step["c"], "weight": rates, "skip": skip, "bias": bias}
    fields |= {"kind": step["softplus"], "number": step["least"], "most": upper}
    sizes = {"heads": heads, "kv_heads": groups, "head_dim": step["head_dim"], "states": states}
    emit_step_with_state(self, "ssd", destination, step, **fields, **sizes)


def read_selective_scan_step(self: _PlanReader, step: Mapping, destination: int, width: int) -> None:
    states, gate = step["states"], step["gate"]
    widths = {"x": width, "dt": width, "b": states, "c": states}
    check_scan_operands(self, step, widths if gate is None else {**widths, "gate": width})
    fields = {"y": step["dt"], "z": step["b"], "c": step["c"], "gate": -1 if gate is None else gate}
    fields["weight"] = self.retained.matrix_index(step["rates"], width, states)
    fields |= {name: self.retained.vector_index(step[name], width) for name in ("skip", "bias")}
    emit_step_with_state(self, "selective", destination, step, kind=step["softplus"], states=states, **fields)


def check_scan_operands(self: _PlanReader, step: Mapping, widths: Mapping[str, int]) -> None:
    self.require(step["states"] <= MAX_STATES, f"a channel has {step['states']} states")
    check_register_widths(self, step, widths)


def check_register_widths(self: _PlanReader, step: Mapping, widths: Mapping[str, int]) -> None:
    for name, width in widths.items():
        self.require(self.width(step[name]) == width, f"its `{name}` has {self.width(step[name])} columns, not {width}")


def read_delta_rule_step(self: _PlanReader, step: Mapping, destination: int, width: int) -> None:
    heads, groups, n, p = (step[name] for name in ("heads", "groups", "head_dim", "value_dim"))
    self.require(
        self.width(step["x"]) == width == heads * p and heads % groups == 0,
        f"{heads} heads of {p} in {groups} groups are not {width} columns",
    )
    self.require(n <= MAX_STATES, f"a key has {n} numbers")
    decays = heads * n if step["by_channel"] else heads
    check_register_widths(self, step, {"k": groups * n, "q": groups * n, "decay": decays, "beta": heads})
    operands = {"y": step["decay"], "z": step["k"], "c": step["q"], "gate": step["beta"], "kind": step["by_channel"]}
    emit_step_with_state(
        self, "delta", destination, step, heads=heads, kv_heads=groups, head_dim=n, value_dim=p, **operands
    )
