"""Attention layers: what they cache, how positions turn their queries and keys, what they attend to."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ...models.checkpoints.pretrained import pretrained
from . import attentions, calls, distances, rotations
from .layout import ColumnRun, column_runs
from .positional import call_node
from .values import CachedRows, KeyScoreBias, Positional, Rows, SourceTokens

if TYPE_CHECKING:
    from .reader import Reader


class AttentionRules:
    """The part of a `Reader` that knows leaf functions of attention."""

    def __init__(self, reader: "Reader"):
        self.reader = reader
        self._rotations: dict[Any, rotations.Rotation | None] = {}
        self._tables: dict[tuple[fx.Node, bool], Tensor | None] = {}

    def lower_cache_update(
        self, node: fx.Node, cache: Any, k: Any, v: Any, layer: int
    ) -> tuple[CachedRows, CachedRows]:
        """Keys and values of all tokens that attention reads from the cache."""
        if not (isinstance(k, Rows) and isinstance(v, Rows) and k.index.dim() == v.index.dim() == 4):
            reason = "keys and values of another form than [batch, heads, tokens, width]"
            raise self.reader.rejection(node, reason)
        return CachedRows(k), CachedRows(v)

    # -- positions -------------------------------------------------------------------------------------------

    def lower_rotary(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Result of a rotary function: rotated queries and keys, or one of them."""
        positions = [index for index, value in enumerate(args) if isinstance(value, Rows)]
        if not positions or any(isinstance(value, (Rows, CachedRows)) for value in kwargs.values()):
            raise self.reader.rejection(node, "a rotary embedding of another form than queries and keys by tables")
        turned_parts = []
        for number, index in enumerate(positions):
            call = _Call(self.reader, node, args, kwargs, index, number)
            rotation = self._rotation(call)
            if rotation is None:
                raise self.reader.rejection(node, "a rotary embedding that the engine does not have")
            turned_parts.append(self._rotate(args[index], rotation, self._is_joined(node, len(positions))))
        return turned_parts[0] if len(turned_parts) == 1 else tuple(turned_parts)

    def _is_joined(self, node: fx.Node, count: int) -> bool:
        """Whether what was cut off the heads is joined again later, so that whole heads are turned at once."""
        parts = [node] if count == 1 else list(node.users)
        return any(calls.operation(user) in calls.JOINS for part in parts for user in part.users)

    def _rotation(self, call: "_Call") -> rotations.Rotation | None:
        """The rotation, by tables of the longest context in which they are one: it may shorten the context."""
        if call.cache_key not in self._rotations:
            self._rotations[call.cache_key] = self._recognise_rotation(call)
        return self._rotations[call.cache_key]

    def _recognise_rotation(self, call: "_Call") -> rotations.Rotation | None:
        for context in dict.fromkeys((self.reader.plan.context, self._original_context())):
            probe = min(rotations.PROBE, context)
            x = torch.ones(1, probe, call.width)
            try:
                if not torch.allclose(call.apply_tables(x, 0, context), call.apply_tables(x, 0, probe), atol=1e-6):
                    continue  # frequencies that depend on the length
                rotation = rotations.recognise_rotation(partial(call.apply_tables, length=context), context, call.width)
            except (RuntimeError, TypeError, ValueError, IndexError):  # made for other operands than one row's
                return None
            self.reader.plan.context = min(self.reader.plan.context, context)
            return rotation
        return None

    def _original_context(self) -> int:
        """The length up to which frequencies are those that the model was first trained with."""
        config = pretrained(self.reader.model).config.get_text_config()
        scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        length = scaling.get("original_max_position_embeddings") if isinstance(scaling, dict) else None
        length = length or getattr(config, "original_max_position_embeddings", None)
        return length if type(length) is int else self.reader.plan.context

    def _rotate(self, x: Rows, rotation: rotations.Rotation, wide: bool) -> Rows:
        """`wide`: what was cut off the heads is joined again later, so whole heads are turned at once."""
        if not rotation.width:
            return Rows(_sorted(x.index, rotation), x.pending)
        plan, x = self.reader.plan, self.reader.materialised(x)
        name = plan.vector_entry(f"{self.reader.current.name}.frequencies", rotation.frequencies.values)
        fields = {
            "rotary_dim": rotation.width,
            "inverse_frequencies": name,
            "scale": rotation.frequencies.scale,
            "interleaved": rotation.interleaved,
        }
        lane = plan.layout.row_layout(x.index)
        head_dim = x.index.shape[-1]
        lane_runs = column_runs(plan.layout, lane.columns)
        if wide and len(lane_runs) == 1 and _cuts_heads(lane_runs[0], plan.layout.widths):
            run = lane_runs[0]
            full_width = plan.layout.widths[run.register]
            turned_register = plan.append_step(
                "rotary", full_width, x=run.register, heads=run.count, head_dim=run.stride, start=run.start, **fields
            )
            source_columns = plan.layout.columns(run.register)
            unturned = ~torch.isin(source_columns, lane.columns)
            plan.copies[turned_register] = (run.register, unturned)
            shifted = x.index - int(source_columns[0]) + int(plan.layout.columns(turned_register)[0])
            return Rows(_sorted(shifted, rotation))
        register, lane = self.reader.register(x)
        turned = self.reader.elementwise(
            "rotary",
            x.index.shape,
            lane,
            x=register,
            heads=len(lane.columns) // head_dim,
            head_dim=head_dim,
            start=0,
            **fields,
        )
        return Rows(_sorted(turned.index, rotation))

    # -- attention -------------------------------------------------------------------------------------------

    def lower_attention(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Rows, None]:
        module, q, k, v, mask = args
        recalls = isinstance(k, SourceTokens) and isinstance(v, SourceTokens)
        k, v = (x.rows if isinstance(x, CachedRows) or recalls else x for x in (k, v))  # encoders cache none
        if not all(isinstance(x, Rows) for x in (q, k, v)):
            raise self.reader.rejection(node, "attention to something else than what the layer caches")
        key_bias = mask if isinstance(mask, KeyScoreBias) else None
        if mask is not None and key_bias is None and not isinstance(mask, Positional):
            raise self.reader.rejection(node, "attention under a mask that tokens decide")
        gaining = [name for name, value in kwargs.items() if self._is_score_bias(node, name, value)]
        of_tokens = (Positional, Rows, CachedRows)
        options = {
            key: value for key, value in kwargs.items() if not isinstance(value, of_tokens) and key not in gaining
        }
        (_, heads, _, head_dim), value_dim = q.index.shape, v.index.shape[3]
        kv_heads = k.index.shape[1]
        sizes = (heads, kv_heads, head_dim, value_dim)
        mask_fn = self._mask(mask) if key_bias is None else self.reader.key_biases.attention_mask(key_bias)
        try:
            gains = partial(self._score_bias, node, module, heads, *gaining[:1])
            form = (
                heads % kv_heads == 0
                and len(gaining) < 2
                and attentions.recognise_attention(module, mask_fn, sizes, options, gains)
            )
        except RuntimeError:  # it is handed tables that were made for the sample's length
            form = None
        if not form:
            raise self.reader.rejection(
                node, "attention that the engine does not have: its scale, cap, window or mask is none of the known"
            )
        if key_bias is not None:
            q, k = self.reader.key_biases.append_bias_column(node, module, form, key_bias, q, k)
            sizes = (heads, kv_heads, head_dim + 1, value_dim)
        by_head = any(x is not None for x in (form.slopes, form.sinks, form.distances))
        kv_order, order = (None, None) if by_head else _unrepeat_heads(k.index, v.index, heads)
        if kv_order is not None and order is not None:
            q, k, v = Rows(q.index[:, order], q.pending), *(Rows(x.index[:, kv_order], x.pending) for x in (k, v))
            sizes = (heads, len(kv_order), *sizes[2:])
        register = (self.cross_attention_register if recalls else self.attention_register)(node, form, [q, k, v], sizes)
        batch, length = self.reader.shape
        rows = self.reader.plan.layout.rows(register).view(batch, length, heads, value_dim)
        return Rows(rows if order is None else rows[:, :, order.argsort()]), None

    def attention_register(
        self, node: fx.Node, form: attentions.Attention, qkv: list[Rows], sizes: tuple[int, ...]
    ) -> int:
        """The register of attention of queries to keys and values; `sizes` as a step has them."""
        plan, (heads, kv_heads, head_dim, value_dim) = self.reader.plan, sizes
        slopes = None if form.slopes is None else plan.vector_entry(f"{node.name}.slopes", form.slopes)
        sinks = None if form.sinks is None else plan.vector_entry(f"{node.name}.sinks", form.sinks)
        distance_table = None if form.distances is None else plan.vector_entry(f"{node.name}.distances", form.distances)
        registers = {name: self.reader.register(x)[0] for name, x in zip("qkv", qkv, strict=True)}
        window = form.window if form.window is not None and form.window < plan.context else None
        return plan.append_step(
            "attention",
            heads * value_dim,
            **registers,
            slot=plan.slot(kv_heads, head_dim, value_dim),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            scale=form.scale,
            softcap=form.softcap,
            window=window,
            sinks=sinks,
            **({} if slopes is None else {"slopes": slopes}),
            **({"whole": True} if form.bidirectional else {}),
            **({} if distance_table is None else {"distances": distance_table}),
        )

    def cross_attention_register(
        self, node: fx.Node, form: attentions.Attention, qkv: list[Rows], sizes: tuple[int, ...]
    ) -> int:
        """The register of attention of queries to a source, whose keys and values its encoder remembers."""
        heads, kv_heads, head_dim, value_dim = sizes
        unsupported = (form.window, form.sinks, form.slopes, form.distances)
        if not form.bidirectional or any(part is not None for part in unsupported):
            raise self.reader.rejection(node, "attention to a source by positions, which the engine has not")
        source = self.reader.source
        assert source is not None, "only behind an encoder there is a source"
        k, v = (source.register(x)[0] for x in qkv[1:])
        return self.reader.plan.append_step(
            "recall",
            heads * value_dim,
            q=self.reader.register(qkv[0])[0],
            slot=source.plan.store_source_keys(k, v, kv_heads, head_dim, value_dim),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            scale=form.scale,
            softcap=form.softcap,
        )

    def _is_score_bias(self, node: fx.Node, name: str, value: Any) -> bool:
        """Whether an option is what scores gain: a number for each pair of tokens of a row, that no token decides."""
        at = node.kwargs[name]
        if not isinstance(at, fx.Node) or not isinstance(value, (Tensor, Positional)):
            return False
        try:
            return distances.of_row(self.reader.positions.at(at, 3), 3)
        except (RuntimeError, TypeError, ValueError, IndexError):  # made for something else than one row
            return False

    def _score_bias(
        self, node: fx.Node, module: torch.nn.Module, heads: int, name: str = "", *, bidirectional: bool = False
    ) -> attentions.ScoreBias | None:
        """Bias that an option adds to scores; it may shorten the context. RuntimeError where more than distance
        counts."""
        if not name:
            return None
        source, plan = node.kwargs[name], self.reader.plan
        assert isinstance(source, fx.Node), f"`{name}` of {node.name} is no value"  # see `_is_score_bias`
        at = partial(self.reader.positions.at, source)
        if (source, bidirectional) not in self._tables:
            config = getattr(module, "config", self.reader.model.config)
            table = distances.bias_table(at, heads, bidirectional, config, plan.context)
            self._tables[source, bidirectional] = None if table is None else table[0]
            plan.context = plan.context if table is None else min(plan.context, table[1])
        known = self._tables[source, bidirectional]
        if known is None:
            raise RuntimeError("scores gain by more than distance")
        return attentions.ScoreBias(name, at, known)

    def _mask(self, mask: Positional | None) -> Any:
        if mask is None:
            return lambda length: None
        return lambda length: self.reader.positions.at(mask.node, length)


def _unrepeat_heads(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """Of keys and values [b, heads, t, d] with copies of heads: those that differ, and the order of queries by them."""
    first = torch.unique(torch.stack([k[0, :, 0, 0], v[0, :, 0, 0]]), dim=1, return_inverse=True)[1]
    numbers = [(first == first[i]).nonzero()[0, 0] for i in range(len(first))]
    numbers_of = torch.stack(numbers)
    distinct, counts = numbers_of.unique(return_counts=True)
    copies = all(torch.equal(x, x[:, numbers_of]) for x in (k, v))
    if len(distinct) == len(numbers_of) or not copies or len(counts.unique()) > 1:
        return None, None
    group = heads // len(numbers_of)
    return distinct, (numbers_of.argsort(stable=True)[:, None] * group + torch.arange(group)).flatten()


def _sorted(index: Tensor, rotation: rotations.Rotation) -> Tensor:
    """Columns in the order in which a rotary function leaves them."""
    ordered = torch.empty_like(index)
    ordered[..., rotation.order] = index
    return ordered


@dataclass(frozen=True)
class _Call:
    """A call of a rotary function, asked for what it makes of one of its operands.

    position  of that operand among the arguments; `number` among those that are numbers of tokens
    """

    reader: "Reader"
    node: fx.Node
    args: tuple[Any, ...]
    options: dict[str, Any]
    position: int
    number: int

    @property
    def width(self) -> int:
        return self.args[self.position].index.shape[-1]

    @property
    def cache_key(self) -> tuple[Any, ...]:
        """Equal for calls that turn alike: every layer has one, and mostly of the same tables."""
        operands = [
            value.node
            if isinstance(value, Positional)
            else tuple(value.index.shape)
            if isinstance(value, Rows)
            else type(value)
            if isinstance(value, torch.nn.Module)
            else repr(value)
            for value in (*self.args, *self.options.values())
        ]
        return self.node.target, self.position, *operands

    def apply_tables(self, x: Tensor, start: int, length: int) -> Tensor:
        """x [heads, t, width] turned by the tables of a context from position `start` on."""

        def operand(value: Any) -> Any:
            if isinstance(value, Positional):
                return _part(self.reader.positions.at(value.node, length), length, start, x.shape[1])
            if isinstance(value, Rows):
                return self._to_value_axes(x.new_zeros(1, x.shape[1], value.index.shape[-1]), value)
            return value

        turned_value = self.args[self.position]
        args = [
            self._to_value_axes(x, value) if value is turned_value and i == self.position else operand(value)
            for i, value in enumerate(self.args)
        ]
        output = call_node(self.node, self.reader.model, args, {k: operand(v) for k, v in self.options.items()})
        output = output[self.number] if isinstance(output, tuple | list) else output
        return self._to_value_axes(output, turned_value, back=True).float()

    def _to_value_axes(self, x: Tensor, like: Rows, back: bool = False) -> Tensor:
        """[heads, t, width] in the axes of a value of tokens, or back: [b, h, t, d], [b, t, h, d] or [b, t, d]."""
        if like.index.dim() == 3:
            return x
        turned = like.index.shape[1] == self.reader.shape[1] and self._moves_along(like.index, 1)
        if back:
            return x[0].transpose(0, 1) if turned else x[0]
        return (x.transpose(0, 1) if turned else x)[None]

    def _moves_along(self, index: Tensor, axis: int) -> bool:
        """Whether tokens follow each other along an axis."""
        _, token = self.reader.plan.layout.locate(index.select(0, 0).select(-1, 0).reshape(-1))
        return bool((token.view(index.shape[1:3]).diff(dim=axis - 1) == 1).all())


def _part(value: Any, length: int, start: int, count: int) -> Any:
    """Some positions of what has an axis of all: tables of a long context are read a part at a time."""
    if not isinstance(value, Tensor) or count == length:
        return value
    axis = next((axis for axis, size in enumerate(value.shape) if size == length), None)
    return value if axis is None else value.narrow(axis, start, count)


def _cuts_heads(run: ColumnRun, widths: list[int]) -> bool:
    """Whether a run is a part of every head of a register."""
    return (
        run.block < run.stride
        and run.stride * run.count == widths[run.register]
        and (run.start + run.block <= run.stride)
    )
