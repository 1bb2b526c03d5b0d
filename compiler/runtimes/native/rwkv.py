"""Layers of RWKV-4, recognised by what they compute: they mix a token with the one before, and a channel with its past.

The past of a channel is a weighted mean of values: of two sums that decay, one of exp(k) * v and one of exp(k), each
without the token itself, whose share counts exp(first) times more. Both are scans of one state, read one token back.
Keys are cut at 60 on both sides, where exp of them is still a number of float32; published models cut them there, too.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from . import linears
from .trees import leaves
from .values import ElementwiseExpr, Rows

if TYPE_CHECKING:
    from .reader import Reader

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

    def wkv_mean(self, k: Tensor, v: Tensor) -> Tensor:
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


def lower_rwkv(reader: "Reader", node: fx.Node, module: nn.Module, args: Any, kwargs: Any) -> tuple[Rows, Any] | None:
    """The steps of such a layer, where a module is one that begins without a state, or with one that is empty."""
    if not args or not isinstance(args[0], Rows) or args[0].index.dim() != 3:
        return None
    if not all(value is None or isinstance(value, bool | Tensor) for value in leaves((args[1:], kwargs))):
        return None
    batch, _, width = args[0].index.shape
    form = recognise_rwkv(module, batch, width, args[1:], kwargs)
    if form is None:
        return None
    steps, x = _Steps(reader, node, module), reader.materialised(args[0])
    output = steps.lower_time_mixing(form, x) if isinstance(form, TimeMixing) else steps.forward(form, x)
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
    outputs, call = _outputs(layers, shares, x), _linear_calls(layers)
    forms = (
        _fit_time_mixing(layers, shares, vectors, outputs, call)
        if vectors
        else _fit_channel_mixing(layers, shares, outputs, call)
    )
    bound = (_SHARE if expected.dtype == torch.float32 else 2e-2) * float(expected.abs().max())
    for form, value in forms:
        if value is not None and float((value - expected[0].float()).abs().max()) <= bound:
            return form
    return None


Outputs = dict[tuple[str, int], Tensor]  # what a layer makes of a mixture
Call = Callable[[str, Tensor], Tensor | None]


def _outputs(layers: dict[str, nn.Linear], shares: list[Tensor], x: Tensor) -> Outputs:
    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    mixed = [x * share + before * (1 - share) for share in shares]
    call = _linear_calls(layers)
    values = {(name, i): call(name, mixed_x) for name, (i, mixed_x) in product(layers, enumerate(mixed))}
    return {key: value for key, value in values.items() if value is not None}


def _linear_calls(layers: dict[str, nn.Linear]) -> Call:
    def call(name: str, x: Tensor) -> Tensor | None:
        layer = layers[name]
        bias = None if layer.bias is None else layer.bias.float()
        return nn.functional.linear(x, layer.weight.float(), bias) if x.shape[-1] == layer.in_features else None

    return call


def _fit_time_mixing(layers: Any, shares: list[Tensor], vectors: list[Tensor], outputs: Outputs, call: Call) -> Any:
    for (decay, first), order, share_order in product(
        permutations(vectors), permutations(layers), permutations(range(3))
    ):
        of_k, of_v, of_r = (shares[i] for i in share_order)
        past = TimeMixing(order, (of_k, of_v, of_r), -decay.exp(), first)
        k, v, r = (outputs.get((name, i)) for name, i in zip(order[:3], share_order, strict=True))
        if k is None or v is None or r is None:
            continue
        if all(part.shape[-1] == len(decay) for part in (k, v, r)):
            yield past, call(order[3], r.sigmoid() * past.wkv_mean(k, v))


def _fit_channel_mixing(layers: Any, shares: list[Tensor], outputs: Outputs, call: Call) -> Any:
    for order, share_order in product(permutations(layers), permutations(range(2))):
        k, r = (outputs.get((name, i)) for name, i in zip((order[0], order[2]), share_order, strict=True))
        value = None if k is None or r is None else call(order[1], k.relu().square())
        if value is not None and r is not None and value.shape == r.shape:
            of_k, of_r = (shares[i] for i in share_order)
            yield ChannelMixing(order, (of_k, of_r)), value * r.sigmoid()


class _Steps:
    """Steps of one layer."""

    def __init__(self, reader: "Reader", node: fx.Node, module: nn.Module):
        self.reader, self.node, self.module = reader, node, module

    def lower_time_mixing(self, form: TimeMixing, x: Rows) -> Rows:
        k, v, r = (self._layer(name, self._mixed(x, mix)) for name, mix in zip(form.layers, form.shares, strict=False))
        weights = self._each(self._each(k, torch.clamp, -_MAX_VALUE, _MAX_VALUE), torch.exp)
        both = torch.cat([self._product(weights, v).index, weights.index], -1)
        before = self._decayed_sums(Rows(both), form.decay.repeat(2))
        share = self.reader.computing.elementwise_with_vector(self.node, "mul", Rows(both), form.first.exp().repeat(2))
        top, bottom = self.reader.computing.elementwise_of_two(self.node, "add", before, share).index.chunk(2, -1)
        mean = self._product(Rows(top), self._each(Rows(bottom), torch.reciprocal))
        return self._layer(form.layers[3], self._product(self._each(r, torch.sigmoid), mean))

    def forward(self, form: ChannelMixing, x: Rows) -> Rows:
        keys, gates = (self._mixed(x, share) for share in form.shares)
        inner = self._each(self._each(self._layer(form.layers[0], keys), torch.relu), torch.square)
        gate = self._each(self._layer(form.layers[2], gates), torch.sigmoid)
        return self._product(self._layer(form.layers[1], inner), gate)

    def _decayed_sums(self, x: Rows, decay: Tensor) -> Rows:
        """Sums [b, t, channels] of the tokens before each, of which every token leaves exp(decay)."""
        reader, plan = self.reader, self.reader.plan
        register, lane = reader.register(x)
        width = len(lane.columns)
        one = plan.append_step("clip", width, x=register, least=1.0, most=1.0)
        single = plan.gather(plan.layout.columns(one)[:1])
        fields: dict[str, Any] = {"b": single, "c": single, "gate": None, "skip": None, "bias": None}
        rates = plan.vector_entry(f"{self.node.target}.rates", decay[:, None])
        sums = reader.elementwise(
            "selective", x.index.shape, lane, x=register, dt=one, states=1, rates=rates, softplus=False, **fields
        )
        return Rows(reader.shifting.shifted_back(sums.index.flatten(0, 1), 1).view(x.index.shape))

    def _mixed(self, x: Rows, share: Tensor) -> Rows:
        before = Rows(self.reader.shifting.shifted_back(x.index.flatten(0, 1), 1).view(x.index.shape))
        parts = ((x, share), (before, 1 - share))
        a, b = (self.reader.computing.elementwise_with_vector(self.node, "mul", term, by) for term, by in parts)
        return self.reader.computing.elementwise_of_two(self.node, "add", a, b)

    def _layer(self, name: str, x: Rows) -> Rows:
        layer = linears.recognise_linear(self.module.get_submodule(name))
        assert layer is not None, f"{name} was a linear layer when it was recognised"
        return self.reader.lower_linear(self.node, x, f"{self.node.target}.{name}", layer)

    def _each(self, x: Rows, function: Any, *operands: float) -> Rows:
        return self.reader.materialised(Rows(x.index, ElementwiseExpr(function, (None, *operands))))

    def _product(self, a: Rows, b: Rows) -> Rows:
        return self.reader.materialised(self.reader.computing.product(self.node, a, b))
