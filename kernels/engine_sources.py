"""Steps between an encoder and the decoder behind it, as `engine_plan.py` checks them.

The encoder is a plan within the plan: it reads a source whole, writes no logits, and remembers keys and values in
slots of its own. The decoder recalls them; it has a cache of its own besides.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .engine_steps import VERSION

if TYPE_CHECKING:
    from .engine_plan import Layout, _PlanReader


def read_encoder_plan(self: "_PlanReader", plan: object) -> "Layout":
    """The encoder of a plan; its weights are numbered with those of the decoder."""
    self.require(not self.inside, "its encoder has an encoder")
    self.require(isinstance(plan, Mapping), "its encoder is not an object")
    assert isinstance(plan, Mapping), "seen just now"
    inner = type(self)({**plan, "version": VERSION}, {}, False)
    inner.retained, inner.inside, inner.location, inner.title = self.retained, True, "the encoder", "the encoder"
    refuse, self.retained.plan_error = self.retained.plan_error, inner.plan_error
    laid = inner.check_plan_and_lay_out()
    self.retained.plan_error = refuse
    return laid


def record_encoder_outputs(self: "_PlanReader", plan: Mapping, steps: list) -> None:
    """Checks of an encoder's plan in place of those of logits."""
    self.require("logits" not in plan, "it has logits, which nothing reads")
    self.require(bool(self.out.cached), "it remembers nothing")
    self.out.bidirectional = True  # a source comes in one call


def read_remember_step(self: "_PlanReader", step: Mapping) -> None:
    self.require(self.inside, "only an encoder remembers sources")
    slot, kv, d, v = (step[name] for name in ("slot", "kv_heads", "head_dim", "value_dim"))
    self.claim_cache_slot(slot, (kv, d, v))
    widths, needed = [self.width(step[name]) for name in "kv"], [kv * d, kv * v]
    self.require(widths == needed, f"its registers have {widths}, not {needed}")
    self.out.cached.add(slot)
    self.append_step("remember", -1, y=step["k"], z=step["v"], slot=slot, kv_heads=kv, head_dim=d, value_dim=v)


def read_recall_step(self: "_PlanReader", step: Mapping, destination: int, width: int) -> None:
    slot, heads = step["slot"], step["heads"]
    kv, d, v = (step[name] for name in ("kv_heads", "head_dim", "value_dim"))
    source = self.out.encoder
    if source is None or slot not in source.cached:
        raise self.plan_error(f"it reads slot {slot} of an encoder, which remembers nothing there")
    slot_sizes = source.slots[slot]
    self.require(
        (slot_sizes.kv_heads, slot_sizes.head_dim, slot_sizes.value_dim) == (kv, d, v),
        f"its sizes are not those of slot {slot}",
    )
    self.require(heads % kv == 0, f"{heads} query heads are not a multiple of {kv} key heads")
    q_width = self.width(step["q"])
    self.require(q_width == heads * d, f"its queries have {q_width} numbers, not {heads * d}")
    self.require(width == heads * v, f"it writes {heads * v} columns, and register {destination} has {width}")
    sizes = {"heads": heads, "kv_heads": kv, "head_dim": d, "value_dim": v}
    softcap = step["softcap"] or 0.0
    self.append_step("recall", destination, x=step["q"], slot=slot, scale=step["scale"], softcap=softcap, **sizes)
