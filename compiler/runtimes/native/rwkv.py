"""Layers of RWKV-4, recognised by what they compute: they mix a token with the one before, and a channel with its past.

The past of a channel is a weighted mean of values: of two sums that decay, one of exp(k) * v and one of exp(k), each
without the token itself, whose share counts exp(first) times more. Both are scans of one state, read one token back.
Keys are cut at 60 on both sides, where exp of them is still a number of float32; published models cut them there, too.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from types import NotImplementedType
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import shifting
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .trees import leaves
from .values import Rows

_LENGTH = 5  # tokens that a layer is tried on
_SHARE = 1e-4  # of outputs of size one, in float32
_MAX_VALUE = 60.0  # of a key


@dataclass(frozen=True)
class TimeMixing:
    """output(sigmoid(r) * past(k, v)); each of k, v and r is a linear layer of a token mixed with the one before.

    layers   of keys, values, gates and outputs, by name
    shares   of the token itself in what these are made of, [width] each
    decay    [channels] logarithm of what a sum keeps for each token, < 0
    first    [channels] logarithm of how many times more the token itself counts
    """

    layers: tuple[str, str, str, str]
    shares: tuple[Tensor, Tensor, Tensor]
    decay: Tensor
    first: Tensor

    def wkv(self, k: Tensor, v: Tensor) -> Tensor:
        """k and v [tokens, channels] from a text's first token on."""
        top, bottom, out = torch.zeros_like(k[0]), torch.zeros_like(k[0]), []
        for weight, value in zip(k.exp(), v, strict=True):
            out.append((top + weight * value * self.first.exp()) / (bottom + weight * self.first.exp()))
            top, bottom = (x * self.decay.exp() + y for x, y in ((top, weight * value), (bottom, weight)))
        return torch.stack(out)


@dataclass(frozen=True)
class ChannelMixing:
    """values(relu(keys) ** 2) * sigmoid(gates); keys and gates are made of a token mixed with the one before."""

    layers: tuple[str, str, str]
    shares: tuple[Tensor, Tensor]


def lower_rwkv(builder: PlanBuilder, call: NodeCall) -> tuple[Rows, Any] | NotImplementedType:
    """The steps of such a layer, where a module is one that begins without a state, or with one that is empty."""
    node, module, args, kwargs = call.node, call.module, call.args, call.kwargs
    if module is None or not isinstance(call.first, Rows) or call.first.index.dim() != 3:
        return NotImplemented
    if not all(value is None or isinstance(value, bool | Tensor) for value in leaves((args[1:], kwargs))):
        return NotImplemented
    batch, _, width = args[0].index.shape
    form = recognise_rwkv(module, batch, width, args[1:], kwargs)
    if form is None:
        return NotImplemented
    x = builder.materialised(args[0])
    lower: Any = _append_time_mixing_steps if isinstance(form, TimeMixing) else _lower_channel_mixing
    output = lower(builder, node, form, x)
    # The engine's own steps keep what the model puts into its state, which stays empty here.
    return output, next((value for value in (*args[1:], *kwargs.values()) if not isinstance(value, bool)), None)


@torch.no_grad()
def recognise_rwkv(
    module: nn.Module, batch: int, width: int, args: Any, kwargs: Any
) -> TimeMixing | ChannelMixing | None:
    """RWKV step that a module computes of x [batch, tokens, width] and its other arguments, or None."""
    layers = {name: part for name, part in module.named_children() if isinstance(part, nn.Linear)}
    parameters = [p.detach() for p in module.parameters(recurse=False)]
    shares = [p.flatten() for p in parameters if p.dim() == 3 and p.numel() == width]
    vectors = [p for p in parameters if p.dim() == 1]
    if (len(layers), len(shares), len(vectors)) not in ((4, 3, 2), (3, 2, 0)):
        return None
    shares, vectors = ([p.float() for p in group] for group in (shares, vectors))
    x = torch.randn((_LENGTH, width), generator=torch.Generator().manual_seed(0))
    try:
        batch_x = x.expand(batch, *x.shape).to(next(module.parameters()).dtype)
        expected = module(batch_x, *copy.deepcopy(args), **copy.deepcopy(kwargs))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else
        return None
    expected = expected[0] if isinstance(expected, tuple) else expected
    if not isinstance(expected, Tensor) or expected.shape != (batch, *x.shape):
        return None
    outputs, call = _outputs_of_layers(layers, shares, x), _make_layer_call(layers)
    forms = (
        _candidate_time_mixings(layers, shares, vectors, outputs, call)
        if vectors
        else _candidate_channel_mixings(layers, shares, outputs, call)
    )
    bound = (_SHARE if expected.dtype == torch.float32 else 2e-2) * float(expected.abs().max())
    for form, value in forms:
        if value is not None and float((value - expected[0].float()).abs().max()) <= bound:
            return form
    return None


Outputs = dict[tuple[str, int], Tensor]  # what a layer makes of a mixture
LayerCall = Callable[[str, Tensor], Tensor | None]


def _outputs_of_layers(layers: dict[str, nn.Linear], shares: list[Tensor], x: Tensor) -> Outputs:
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    mixed = [x * share + before * (1 - share) for share in shares]
    call = _make_layer_call(layers)
    values = {(name, i): call(name, mixed_x) for name, (i, mixed_x) in product(layers, enumerate(mixed))}
    return {key: value for key, value in values.items() if value is not None}


def _make_layer_call(layers: dict[str, nn.Linear]) -> LayerCall:
    def call(name: str, x: Tensor) -> Tensor | None:
        layer = layers[name]
        bias = None if layer.bias is None else layer.bias.float()
        return nn.functional.linear(x, layer.weight.float(), bias) if x.shape[-1] == layer.in_features else None

    return call


def _candidate_time_mixings(
    linear_paths: Any, shares: list[Tensor], vectors: list[Tensor], outputs: Outputs, call_layer: LayerCall
) -> Iterator[tuple[TimeMixing, Tensor | None]]:
    for (decay, first), order, share_order in product(
        permutations(vectors), permutations(linear_paths), permutations(range(3))
    ):
        of_k, of_v, of_r = (shares[i] for i in share_order)
        past = TimeMixing(order, (of_k, of_v, of_r), -decay.exp(), first)
        k, v, r = (outputs.get((name, i)) for name, i in zip(order[:3], share_order, strict=True))
        if k is None or v is None or r is None:
            continue
        if all(part.shape[-1] == len(decay) for part in (k, v, r)):
            yield past, call_layer(order[3], r.sigmoid() * past.wkv(k, v))


def _candidate_channel_mixings(
    linear_paths: Any, shares: list[Tensor], outputs: Outputs, call_layer: LayerCall
) -> Iterator[tuple[ChannelMixing, Tensor]]:
    for order, share_order in product(permutations(linear_paths), permutations(range(2))):
        k, r = (outputs.get((name, i)) for name, i in zip((order[0], order[2]), share_order, strict=True))
        value = None if k is None or r is None else call_layer(order[1], k.relu().square())
        if value is not None and r is not None and value.shape == r.shape:
            of_k, of_r = (shares[i] for i in share_order)
            yield ChannelMixing(order, (of_k, of_r)), value * r.sigmoid()


def _append_time_mixing_steps(builder: PlanBuilder, node: fx.Node, form: TimeMixing, x: Rows) -> Rows:
    k, v, r = (
        builder.lower_submodule(node, name, _mixed(builder, node, x, share))
        for name, share in zip(form.layers, form.shares, strict=False)
    )
    weights = builder.apply(builder.apply(k, torch.clamp, -_MAX_VALUE, _MAX_VALUE), torch.exp)
    both = Rows(torch.cat([builder.product(weights, v).index, weights.index], -1))
    before = _append_decayed_sums(builder, node, both, form.decay.repeat(2))
    share = builder.elementwise_with_vector(node, "mul", both, form.first.exp().repeat(2))
    top, bottom = builder.elementwise_of_two("add", before, share).index.chunk(2, -1)
    mean = builder.product(Rows(top), builder.apply(Rows(bottom), torch.reciprocal))
    return builder.lower_submodule(node, form.layers[3], builder.product(builder.apply(r, torch.sigmoid), mean))


def _lower_channel_mixing(builder: PlanBuilder, node: fx.Node, form: ChannelMixing, x: Rows) -> Rows:
    keys, gates = (_mixed(builder, node, x, share) for share in form.shares)
    inner = builder.apply(builder.lower_submodule(node, form.layers[0], keys), torch.relu)
    squared = builder.apply(inner, torch.square)
    gate = builder.apply(builder.lower_submodule(node, form.layers[2], gates), torch.sigmoid)
    return builder.product(builder.lower_submodule(node, form.layers[1], squared), gate)


def _append_decayed_sums(builder: PlanBuilder, node: fx.Node, x: Rows, decay: Tensor) -> Rows:
    """Sums [b, t, channels] of the tokens before each, of which every token leaves exp(decay)."""
    plan, (register, lane) = builder.plan, builder.register(x)
    one = plan.append_step("clip", len(lane.columns), x=register, least=1.0, most=1.0)
    single = plan.materialize_columns(plan.layout.columns(one)[:1])
    fields: dict[str, Any] = {"b": single, "c": single, "gate": None, "skip": None, "bias": None, "softplus": False}
    rates = plan.add_vector(f"{node.target}.rates", decay[:, None])
    sums = builder.elementwise("selective", x.index.shape, lane, x=register, dt=one, states=1, rates=rates, **fields)
    return _token_before(builder, sums)


def _mixed(builder: PlanBuilder, node: fx.Node, x: Rows, share: Tensor) -> Rows:
    """Each token mixed with the one before, by shares of the token itself."""
    parts = ((x, share), (_token_before(builder, x), 1 - share))
    a, b = (builder.elementwise_with_vector(node, "mul", term, by) for term, by in parts)
    return builder.elementwise_of_two("add", a, b)


def _token_before(builder: PlanBuilder, x: Rows) -> Rows:
    return Rows(shifting.append_token_shift(builder, x.index.flatten(0, 1), 1).view(x.index.shape))
