"""The plan of a model for the native engine: checked field by field, then laid out as C++ reads it.

A plan is a closed list of steps over registers. A register is float32 rows [tokens, width]; every step
writes one that no other step writes, from registers that steps before it wrote. `engine_steps.py` lists the ops
and their fields; whatever a plan says, nothing past `check_plan_and_weights` leaves its memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from . import engine_mixtures, engine_scans, engine_sources
from .engine_steps import (
    KV_NUMBERS,
    LATER,
    MAX_BIDIRECTIONAL,
    MAX_HEAD,
    OPS,
    SILENT,
    STATEFUL,
    STEPS,
    VERSION,
    Slot,
    Step,
    Weight,
)
from .engine_weights import WeightTable
from .native import KernelError


@dataclass
class Layout:
    """A checked plan: what C++ reads, and what it says of the model."""

    widths: list[int]
    slots: list[Slot]
    logits: int
    context: int  # the model's limit of tokens in a sequence
    vocabulary: int  # ids that the embedding knows
    stateful: bool = False  # steps keep states of all that came before, which know no way back
    bidirectional: bool = False  # an attention sees the tokens that follow too, so a text comes in one call
    encoder: "Layout | None" = None  # reads sources, whose keys and values are recalled; it has no logits
    cached: set[int] = field(default_factory=set)  # slots that it remembers sources in
    steps: list[Step] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)


def check_plan_and_weights(plan: Mapping, weights: Mapping[str, Tensor], compares_checksums: bool = False) -> Layout:
    """Check a plan and its weights; KernelError names the first step, register or weight that does not fit.

    weights   uint8 rows of bytes as `packed.pack` makes them, float32 or bfloat16; contiguous, in memory
    compares_checksums   read every packed weight whole and compare checksums, instead of sizes and headers alone
    """
    return _PlanReader(plan, weights, compares_checksums).check_plan_and_lay_out()


class _PlanReader:
    def __init__(self, plan: Mapping, weights: Mapping[str, Tensor], compares_checksums: bool):
        self.plan, self.retained = plan, WeightTable(weights, compares_checksums, self.plan_error)
        self.location = "the plan"
        self.title = "the plan"
        self.assigned: set[int] = set()
        self.angles: dict[tuple, int] = {}
        self.used_slots: set[int] = set()
        self.ids: list[int] = []
        self.chosen: dict[int, tuple[int, int]] = {}  # register -> experts, how many of them
        self.states = 0
        self.inside = False  # whether it is the encoder of a plan that is read

    def plan_error(self, problem: str) -> KernelError:
        return KernelError(f"the plan can't be run: {self.location}: {problem}")

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise self.plan_error(problem)

    def check_plan_and_lay_out(self) -> Layout:
        plan = self.plan
        self.require(isinstance(plan, Mapping), "it is not an object")
        self.require(
            plan.get("version") == VERSION, f"its version is {plan.get('version')}, and this effc reads {VERSION}"
        )
        widths = self.required_list("registers", "its registers are no list of widths")
        self.require(all(_is_int_of_at_least(w, 1) for w in widths), "its registers are no list of widths")
        slots = self.required_list("slots", "its slots are no list")
        self.require(_is_int_of_at_least(plan.get("context"), 1), "its context is no number of tokens")
        self.out = Layout([*widths], [self.read_cache_slot(s) for s in slots], -1, plan["context"], 0)
        if "encoder" in plan:
            self.out.encoder = engine_sources.read_encoder_plan(self, plan["encoder"])
        steps = self.required_list("steps", "it has no steps")
        self.require(bool(steps), "it has no steps")
        for number, step in enumerate(steps):
            op = step.get("op") if isinstance(step, Mapping) else None
            self.require(isinstance(op, str) and op in STEPS, f"step {number} is none that the engine knows")
            self.location = f"{self.title}, step {number}, {op}" if self.inside else f"step {number}, {op}"
            self.read_step(step)
        self.location = self.title
        self.require(len(self.used_slots) == len(slots), "a slot of its cache is not used by any attention")
        self.require(bool(self.ids), "it has no embedding of tokens")
        if self.inside:
            engine_sources.record_encoder_outputs(self, plan, steps)
        else:
            self.check_logits_register(plan.get("logits"), steps)
        self.out.stateful = any(s["op"] in STATEFUL for s in steps)
        self.require(
            not (self.out.bidirectional and self.out.stateful),
            "it sees texts whole, and keeps states of what came before",
        )
        self.require(
            not self.out.bidirectional or self.out.context <= MAX_BIDIRECTIONAL,
            f"it sees {self.out.context} tokens at once",
        )
        self.out.vocabulary, self.out.weights = min(self.ids), self.retained.laid
        return self.out

    def required_list(self, name: str, problem: str) -> list:
        """A list of the plan; another value is refused."""
        value = self.plan.get(name)
        if not isinstance(value, list):
            raise self.plan_error(problem)
        return value

    def check_logits_register(self, logits, steps: list) -> None:
        self.require(
            _is_int_of_at_least(logits, 0) and logits in self.assigned,
            f"its logits are register {logits}, which no step writes",
        )
        readers = [r for s in steps for r in self.registers_read_by_step(s)]
        self.require(logits not in readers, "a step reads the logits")
        writer = next(s for s in steps if s["to"] == logits)
        self.require(
            writer["op"] not in ("columns", "join", "attention", "recall", "scores", "route", "experts", *STATEFUL),
            "its logits are no register of their own",
        )
        self.out.logits = logits

    @staticmethod
    def registers_read_by_step(step: Mapping) -> list[int]:
        kinds = STEPS[step["op"]]
        return [
            r
            for name, kind in kinds.items()
            if kind in ("r", "r?", "R")
            for r in (step[name] if kind == "R" else [step[name]])
            if r is not None
        ]

    def read_cache_slot(self, slot) -> Slot:
        fields = slot if isinstance(slot, Mapping) else {}
        head_dim = fields.get("head_dim", 0)
        sizes = [fields.get("kv_heads", 0), head_dim, fields.get("value_dim", head_dim)]
        self.require(all(_is_int_of_at_least(s, 1) and s <= 65536 for s in sizes), "a slot of its cache has no sizes")
        self.require(
            max(sizes[1:]) <= MAX_HEAD, f"a head has {max(sizes[1:])} dimensions, and the engine takes {MAX_HEAD}"
        )
        numbers = fields.get("numbers", KV_NUMBERS[0])
        self.require(numbers in KV_NUMBERS, f"a slot of its cache holds {numbers!r:.40}, and the engine bf16 or int8")
        return Slot(*sizes, KV_NUMBERS.index(numbers))

    def read_step(self, fields: Mapping) -> None:
        step = {**{name: value for name, value in LATER.items() if name in STEPS[fields["op"]]}, **fields}
        self.check_step_fields(step)
        if step["op"] in SILENT:
            getattr(self, f"_{step['op']}")(step)
            return
        to = step["to"]
        getattr(self, f"_{step['op']}")(step, to, self.out.widths[to])
        self.assigned.add(to)

    def check_step_fields(self, step: Mapping) -> None:
        kinds = {**({} if step["op"] in SILENT else {"to": "t"}), **STEPS[step["op"]]}
        for name in step.keys() - kinds.keys() - {"op"}:
            raise self.plan_error(f"it has a field `{name}`, which this op does not have")
        for name, kind in kinds.items():
            self.require(name in step, f"it has no `{name}`")
            self.require(self.is_field_of_kind(step[name], kind), f"its `{name}` is {step[name]!r}")

    def is_field_of_kind(self, value, kind: str) -> bool:
        if kind == "t":
            return _is_int_of_at_least(value, 0) and value < len(self.out.widths) and value not in self.assigned
        if kind in ("r", "r?"):
            return (_is_int_of_at_least(value, 0) and value in self.assigned) or (kind == "r?" and value is None)
        if kind == "R":
            return isinstance(value, list) and len(value) > 0 and all(self.is_field_of_kind(v, "r") for v in value)
        if kind == "W":
            return isinstance(value, list) and len(value) > 0 and all(self.is_field_of_kind(v, "w") for v in value)
        if kind in ("w", "w?"):
            return (isinstance(value, str) and value in self.retained.tensors) or (kind == "w?" and value is None)
        if kind in ("+", "0", "+?"):
            return _is_int_of_at_least(value, int(kind != "0")) or (kind == "+?" and value is None)
        if kind in ("f", "f?"):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            return (number and (kind == "f" or value > 0)) or (kind == "f?" and value is None)
        return isinstance(value, bool) if kind == "b" else value in kind.split()

    def width(self, register: int) -> int:
        return self.out.widths[register]

    def append_step(self, op: str, destination: int, **fields) -> None:
        none = dict.fromkeys(("x", "y", "z", "c", "gate", "weight", "bias", "skip"), -1)
        values = {**none, **fields}
        self.out.steps.append(Step(op=OPS.index(op), to=destination, **values))

    # -- ops

    def _embedding(self, step, destination, width) -> None:
        number = self.retained.weight_index(step["table"])
        table = self.retained.laid[number]
        self.require(table.k == width, f"its rows have {table.k} numbers, and register {destination} has {width}")
        self.ids.append(table.n)
        self.append_step("embedding", destination, weight=number)

    def _positions(self, step, destination, width) -> None:
        number = self.retained.weight_index(step["table"])
        table = self.retained.laid[number]
        self.require(table.form >= 16 and table.k == width, f"its table is not rows of {width} float32 or bfloat16")
        self.out.context = min(self.out.context, table.n)
        self.append_step("positions", destination, weight=number)

    def _norm(self, step, destination, width) -> None:
        group = step["group"]
        self.require(self.width(step["x"]) == width and width % group == 0, f"groups of {group} do not divide {width}")
        self.require(step["eps"] >= 0, f"its `eps` is {step['eps']}")
        kind = ("rms", "layer").index(step["kind"])
        weight, bias = (self.retained.vector_index(step[name], group, width) for name in ("weight", "bias"))
        fields = {"kind": kind, "group": group, "number": step["eps"], "weight": weight, "bias": bias}
        self.append_step("norm", destination, x=step["x"], **fields)

    def _mean(self, step, destination, width) -> None:
        columns, group = self.width(step["x"]), step["group"]
        self.require(columns == width * group, f"{width} groups of {group} are not {columns} columns")
        self.append_step("mean", destination, x=step["x"], group=group)

    def _linear(self, step, destination, width) -> None:
        number = self.retained.weight_index(step["weight"])
        w, k = self.retained.laid[number], self.width(step["x"])
        self.require(w.form < 16, f"weight `{step['weight']}` is not packed for any kernel")
        self.require(
            (w.n, w.k) == (width, k), f"its weight takes {w.k} numbers to {w.n}, and its registers have {k} and {width}"
        )
        self.append_step(
            "linear", destination, x=step["x"], weight=number, bias=self.retained.vector_index(step["bias"], width)
        )

    def _columns(self, step, destination, width) -> None:
        start, block, stride, count = (step[name] for name in ("start", "block", "stride", "count"))
        columns = self.width(step["x"])
        self.require(
            block * count == width and start + (count - 1) * stride + block <= columns,
            f"columns {start}.. are not all in register {step['x']} of {columns}, or not {width}",
        )
        self.append_step("columns", destination, x=step["x"], start=start, block=block, stride=stride, count=count)

    def _join(self, step, destination, width) -> None:
        self.require(
            sum(map(self.width, step["from"])) == width, f"its parts do not fill register {destination} of {width}"
        )
        start = 0
        for register in step["from"]:
            self.append_step("place", destination, x=register, start=start)
            start += self.width(register)

    def _rotary(self, step, destination, width) -> None:
        heads, d, turned, start = (step[name] for name in ("heads", "head_dim", "rotary_dim", "start"))
        self.require(self.width(step["x"]) == width == heads * d, f"{heads} heads of {d} are not {width} columns")
        self.require(turned % 2 == 0 and start + turned <= d, f"{turned} from {start} are no pairs in a head of {d}")
        key = (step["inverse_frequencies"], step["scale"])
        if key not in self.angles:
            self.out.widths.append(turned)
            number = self.retained.vector_index(step["inverse_frequencies"], turned // 2)
            self.angles[key] = len(self.out.widths) - 1
            self.append_step("angles", self.angles[key], weight=number, scale=step["scale"])
        self.require(self.width(self.angles[key]) == turned, f"its {turned} columns need as many half frequencies")
        sizes = {"heads": heads, "head_dim": d, "rotary_dim": turned, "start": start}
        self.append_step(
            "rotary", destination, x=step["x"], y=self.angles[key], interleaved=step["interleaved"], **sizes
        )

    def _attention(self, step, destination, width) -> None:
        slot, heads = step["slot"], step["heads"]
        kv, d, v = (step[name] for name in ("kv_heads", "head_dim", "value_dim"))
        self.claim_cache_slot(slot, (kv, d, v))
        self.require(heads % kv == 0, f"{heads} query heads are not a multiple of {kv} key heads")
        bidirectional = step["whole"]
        self.require(not (bidirectional and step["slopes"]), "a text that is seen whole has no slopes by distance")
        self.out.bidirectional |= bidirectional
        widths, needed = [self.width(step[name]) for name in "qkv"], [heads * d, kv * d, kv * v]
        self.require(widths == needed, f"its registers have {widths}, not {needed}")
        self.require(width == heads * v, f"it writes {heads * v} columns, and register {destination} has {width}")
        sizes = {"slot": slot, "heads": heads, "kv_heads": kv, "head_dim": d, "value_dim": v}
        scores = {"scale": step["scale"], "softcap": step["softcap"] or 0.0, "count": int(bidirectional)}
        scores["window"] = min(step["window"] or 0, 2**31 - 1)
        sinks, slopes = (self.retained.vector_index(step[name], heads) for name in ("sinks", "slopes"))
        distances = self.read_distance_table(step["distances"], heads, bidirectional)
        tables = {"weight": sinks, "skip": slopes, "bias": distances}
        self.append_step("attention", destination, x=step["q"], y=step["k"], z=step["v"], **sizes, **scores, **tables)

    def claim_cache_slot(self, slot: int, sizes: tuple[int, int, int]) -> None:
        """A slot that no step before has, of these heads, numbers of a key and of a value."""
        self.require(
            slot < len(self.out.slots) and slot not in self.used_slots, f"its slot {slot} is not there or not free"
        )
        self.used_slots.add(slot)
        slot_sizes = self.out.slots[slot]
        self.require(
            (slot_sizes.kv_heads, slot_sizes.head_dim, slot_sizes.value_dim) == sizes,
            f"its sizes are not those of slot {slot}",
        )

    def read_distance_table(self, name: str | None, heads: int, bidirectional: bool) -> int:
        """A table of what scores gain: of a text seen whole as many columns on both sides of the token's own."""
        number = -1 if name is None else self.retained.matrix_index(name, heads, None)
        columns = self.retained.laid[number].k if number >= 0 else 1
        self.require(
            not bidirectional or columns % 2 == 1, f"weight `{name}` has {columns} columns, and none is in their middle"
        )
        return number

    # -- elementwise

    def append_pointwise_step(self, step, destination, width, **fields) -> None:
        both = [step[name] for name in "xy" if name in step]
        self.require(
            all(self.width(r) == width for r in both), f"registers {[*both, destination]} have different widths"
        )
        self.append_step(step["op"], destination, x=both[0], y=both[1] if len(both) > 1 else -1, **fields)

    def _act(self, step, destination, width) -> None:
        self.append_pointwise_step(step, destination, width, kind=STEPS["act"]["kind"].split().index(step["kind"]))

    def _add(self, step, destination, width) -> None:
        self.append_pointwise_step(step, destination, width)

    _mul = _add

    def _scale(self, step, destination, width) -> None:
        self.append_pointwise_step(step, destination, width, number=step["by"])

    _shift = _scale

    def _softcap(self, step, destination, width) -> None:
        self.require(step["at"] > 0, f"its `at` is {step['at']}")
        self.append_pointwise_step(step, destination, width, number=step["at"])

    def _clip(self, step, destination, width) -> None:
        self.require(step["least"] <= step["most"], f"its numbers are to be {step['least']} to {step['most']}")
        self.append_pointwise_step(step, destination, width, number=step["least"], most=step["most"])

    def _xielu(self, step, destination, width) -> None:
        self.append_pointwise_step(
            step, destination, width, most=step["square"], scale=step["exponential"], number=step["linear"]
        )

    def _add_vector(self, step, destination, width) -> None:
        self.append_pointwise_step(step, destination, width, weight=self.retained.vector_index(step["vector"], width))

    _mul_vector = _add_vector
    _scores, _route, _experts = (
        engine_mixtures.read_scores_step,
        engine_mixtures.read_route_step,
        engine_mixtures.read_experts_step,
    )
    _convolve, _ssd, _selective = (
        engine_scans.read_convolution_step,
        engine_scans.read_ssd_step,
        engine_scans.read_selective_scan_step,
    )
    _delta = engine_scans.read_delta_rule_step
    _remember, _recall = engine_sources.read_remember_step, engine_sources.read_recall_step


def _is_int_of_at_least(value, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value < 2**31
