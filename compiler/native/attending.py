"""Attention layers: what they cache, how positions turn their queries and keys, what they attend to."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from . import attentions, calls, rotations
from .layout import Run, runs
from .values import Cached, Positional, Rows

if TYPE_CHECKING:
    from .reader import Reader

_ROTARY_PROBE = 16       # positions at which tables are compared with those of the longest context


class Attending:
    """The part of a `Reader` that knows leaf functions of attention."""

    def __init__(self, reader: "Reader"):
        self.reader = reader
        self._rotations: dict[Any, rotations.Rotation | None] = {}

    def cached(self, node: fx.Node, cache: Any, k: Any, v: Any, layer: int) -> tuple[Cached, Cached]:
        """Keys and values go into a slot of their own, in the order of the program."""
        if not (isinstance(k, Rows) and isinstance(v, Rows) and k.index.dim() == v.index.dim() == 4):
            why = "keys and values of another form than [batch, heads, tokens, width]"
            raise self.reader.refuse(node, why)
        slot = self.reader.plan.slot(k.index.shape[1], k.index.shape[3], v.index.shape[3])
        return Cached(slot, k), Cached(slot, v)

    # -- positions -------------------------------------------------------------------------------------------

    def rotated(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Rows, Rows]:
        module, q, k, cos, sin, *more = args
        tables = [table.node for table in (cos, sin) if isinstance(table, Positional)]
        heads = [x for x in (q, k) if isinstance(x, Rows) and x.index.dim() == 4]
        if len(tables) < 2 or len(heads) < 2 or more or kwargs.get("unsqueeze_dim", 1) != 1:
            raise self.reader.refuse(node, "a rotary embedding of another form than (q, k, cos, sin)")
        counts, width = (q.index.shape[1], k.index.shape[1]), q.index.shape[3]
        key = (*tables, *counts, width, type(module))
        if key not in self._rotations:
            self._rotations[key] = self._rotation(module, tables, counts, width, kwargs)
        rotation = self._rotations[key]
        if rotation is None:
            raise self.reader.refuse(node, "a rotary embedding that the engine does not have")
        wide = any(calls.name_of(user) in calls.JOINS for part in node.users for user in part.users)
        return self._turned(q, rotation, wide), self._turned(k, rotation, wide)

    def _rotation(self, module: Any, tables: list[fx.Node], heads: tuple[int, int], width: int,
                  options: dict[str, Any]) -> rotations.Rotation | None:
        """The rotation, by tables of the longest context in which they are one: it may shorten the context."""
        for context in dict.fromkeys((self.reader.plan.context, self._original_context())):
            cos, sin = (self._rows(table, context) for table in tables)
            probe = min(_ROTARY_PROBE, context)
            if not torch.allclose(self._rows(tables[0], probe), cos[:probe], atol=1e-6):
                continue                              # frequencies that depend on the length
            self.reader.plan.context = min(self.reader.plan.context, context)
            return rotations.recognise(module, cos, sin, heads, width, options)
        return None

    def _original_context(self) -> int:
        """The length up to which frequencies are those that the model was first trained with."""
        config = self.reader.model.config.get_text_config()
        scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        found = scaling.get("original_max_position_embeddings") if isinstance(scaling, dict) else None
        found = found or getattr(config, "original_max_position_embeddings", None)
        return found if type(found) is int else self.reader.plan.context

    def _rows(self, table: fx.Node, length: int) -> Tensor:
        found = self.reader.positions.at(table, length)
        return found.float().reshape(length, -1)

    def _turned(self, x: Rows, rotation: rotations.Rotation, wide: bool) -> Rows:
        """`wide`: what was cut off the heads is joined again later, so whole heads are turned at once."""
        plan, x = self.reader.plan, self.reader.settled(x)
        name = plan.vector(f"{self.reader.current.name}.frequencies", rotation.frequencies.values)
        fields = {"rotary_dim": rotation.width, "inverse_frequencies": name,
                  "scale": rotation.frequencies.scale, "interleaved": rotation.interleaved}
        lane = plan.layout.lane(x.index)
        heads, head_dim = x.index.shape[1], x.index.shape[3]
        found = runs(plan.layout, lane.columns)
        if wide and len(found) == 1 and _cuts_heads(found[0], plan.layout.widths):
            run = found[0]
            whole = plan.layout.widths[run.register]
            made = plan.step("rotary", whole, x=run.register, heads=run.count, head_dim=run.stride,
                             start=run.start, **fields)
            own = plan.layout.columns(run.register)
            kept = ~torch.isin(own, lane.columns)
            plan.copies[made] = (run.register, kept)
            moved = x.index - int(own[0]) + int(plan.layout.columns(made)[0])
            return Rows(moved)
        register, lane = self.reader.register(x)
        return self.reader.written("rotary", x.index.shape, lane, x=register, heads=heads, head_dim=head_dim,
                                   start=0, **fields)

    # -- attention -------------------------------------------------------------------------------------------

    def attention(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Rows, None]:
        module, q, k, v, mask = args
        if not (isinstance(q, Rows) and isinstance(k, Cached) and isinstance(v, Cached) and k.slot == v.slot):
            raise self.reader.refuse(node, "attention to something else than what the layer caches")
        if mask is not None and not isinstance(mask, Positional):
            raise self.reader.refuse(node, "attention under a mask that tokens decide")
        of_tokens = (Positional, Rows, Cached)
        options = {key: value for key, value in kwargs.items() if not isinstance(value, of_tokens)}
        (_, heads, _, head_dim), value_dim = q.index.shape, v.rows.index.shape[3]
        kv_heads = k.rows.index.shape[1]
        sizes = (heads, kv_heads, head_dim, value_dim)
        found = heads % kv_heads == 0 and attentions.recognise(module, self._mask(mask), sizes, options)
        if not found:
            raise self.reader.refuse(node, "attention that the engine does not have: its scale, cap, window or "
                                           "mask is none of the known")
        plan = self.reader.plan
        sinks = None if found.sinks is None else plan.vector(f"{node.name}.sinks", found.sinks)
        registers = {name: self.reader.register(x)[0] for name, x in (("q", q), ("k", k.rows), ("v", v.rows))}
        window = found.window if found.window is not None and found.window < plan.context else None
        made = plan.step("attention", heads * value_dim, **registers, slot=k.slot, heads=heads,
                         kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, scale=found.scale,
                         softcap=found.softcap, window=window, sinks=sinks)
        batch, length = self.reader.shape
        return Rows(plan.layout.rows(made).view(batch, length, heads, value_dim)), None

    def _mask(self, mask: Positional | None) -> Any:
        if mask is None:
            return lambda length: None
        return lambda length: self.reader.positions.at(mask.node, length)


def _cuts_heads(run: Run, widths: list[int]) -> bool:
    """Whether a run is a part of every head of a register."""
    return run.block < run.stride and run.stride * run.count == widths[run.register] and (
        run.start + run.block <= run.stride)
