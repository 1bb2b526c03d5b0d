"""Score bias by key: a mask computed from the tokens, as in dynamic mask attention.

A score of q and k gains what k's token makes: a column more of the key, which the query meets with one over the scale.
Where a text has more keys than a layer keeps, it drops those that gain least; the engine's context ends before that.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from . import calls, graph_values
from .attentions import Attention
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .trees import index
from .values import CachedRows, KeyScoreBias, Positional, Rows

_HIDES = -1e4  # a score that gains no more than this is that of a key that is not seen
_SHORT_LENGTH, _LONG_LENGTH, _FULL_LENGTH = (
    4,
    7,
    8,
)  # keys that a layer is made to keep, tokens of a text, and keys that are more than those
_REASON = "scores that gain by what tokens are otherwise than by a number of each key"


class _Enough(Exception):
    """A forward has come to the module that was asked for."""


def makes_key_score_bias(builder: PlanBuilder, call: NodeCall) -> bool:
    """Whether a call has such numbers among its operands, or hides some of those that a token's key gains."""
    if KeyScoreBias in call.kinds:
        return True
    hides = call.args[2] if call.name == "masked_fill" and len(call.args) == 3 else 0.0
    known = isinstance(hides, float) and hides <= _HIDES
    return known and isinstance(call.first, CachedRows) and isinstance(call.args[1], Positional)


def lower_key_score_bias(builder: PlanBuilder, call: NodeCall) -> Any:
    node, name, first, args, kwargs = call.node, call.name, call.first, call.args, call.kwargs
    if isinstance(first, CachedRows):
        return KeyScoreBias(first.rows, args[1])
    if name in calls.SIZE_CALLS and isinstance(first, KeyScoreBias):
        return graph_values.lower_size_of(builder, call, first.rows.index)
    if name in calls.MOVES and isinstance(first, KeyScoreBias):
        mapped = calls.run_on_element_numbers(node, (first.rows.index, *map(index, args[1:])), kwargs)
        if isinstance(mapped, Tensor):
            return KeyScoreBias(Rows(mapped, first.rows.pending), first.hides)
    raise builder.rejection(node, _REASON)


def mask_function_of_length(builder: PlanBuilder, key_bias: KeyScoreBias) -> Any:
    """Mask argument of an attention: n -> [1, 1, n, n]."""

    def at(length: int) -> Tensor:
        hides = builder.positions.at(key_bias.hides.node, length)
        return torch.zeros(hides.shape).masked_fill(hides, torch.finfo(torch.float32).min)

    return at


def append_bias_column(
    builder: PlanBuilder, node: fx.Node, module: nn.Module, form: Attention, key_bias: KeyScoreBias, q: Rows, k: Rows
) -> tuple[Rows, Rows]:
    """Queries and keys with a column more, whose product is what the score of a key gains."""
    heads, kv_heads = q.index.shape[1], k.index.shape[1]
    gains = key_bias.rows.index  # [b, heads, queries, keys]
    per_key = gains[:, :, :1].expand_as(gains)
    by_group = gains[:, :: max(1, heads // kv_heads)].repeat_interleave(heads // kv_heads, 1)
    fits = gains.dim() == 4 and gains.shape[1] == heads and form.softcap is None
    if not fits or not torch.equal(gains, per_key) or not torch.equal(gains, by_group):
        raise builder.rejection(node, _REASON)
    _limit_context_to_cached_keys(builder, module)
    columns = builder.materialised(Rows(gains[:, :: heads // kv_heads, 0, :, None], key_bias.rows.pending)).index
    q, k = builder.materialised(q), builder.materialised(k)
    one, _ = builder.register(Rows(q.index[:, :1, :, :1]))
    share = builder.plan.append_step("clip", 1, x=one, least=1 / form.scale, most=1 / form.scale)
    batch, length = builder.shape
    shares = builder.rows(share).view(batch, 1, length, 1).expand(-1, heads, -1, -1)
    return Rows(torch.cat([q.index, shares], -1)), Rows(torch.cat([k.index, columns], -1))


def _limit_context_to_cached_keys(builder: PlanBuilder, module: nn.Module) -> None:
    """A context of as many tokens as a layer keeps all keys of."""
    integers = [name for name, value in vars(module).items() if type(value) is int and value > 0]
    limits = builder.remember(
        ("limits of keys", type(module)),
        lambda: [name for name in integers if _limits_visible_keys(builder, module, name)],
    )
    plan = builder.plan
    plan.context = min([plan.context, *(vars(module)[name] for name in limits)])


def _limits_visible_keys(builder: PlanBuilder, module: nn.Module, attribute: str) -> bool:
    """Whether a number that a module holds, as it is made small, changes what longer texts give, and only those."""
    original = vars(module)[attribute]
    try:
        outputs = {
            (n, length): _output_with_attribute(builder, module, attribute, n, length)
            for n in (_SHORT_LENGTH, _FULL_LENGTH)
            for length in (_SHORT_LENGTH, _LONG_LENGTH)
        }
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # it is something else's number
        return False
    finally:
        setattr(module, attribute, original)
    short, long = (
        (outputs[_SHORT_LENGTH, length], outputs[_FULL_LENGTH, length]) for length in (_SHORT_LENGTH, _LONG_LENGTH)
    )
    return torch.equal(*short) and not torch.equal(*long)


@torch.no_grad()
def _output_with_attribute(builder: PlanBuilder, module: nn.Module, name: str, value: int, length: int) -> Tensor:
    """Output of a module for a text, with one of its numbers changed."""
    outputs: list[Tensor] = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    setattr(module, name, value)
    ids = torch.arange(length)[None] % builder.plan.vocabulary
    hook = module.register_forward_hook(stop)
    try:
        builder.model(input_ids=ids)
    except _Enough:
        return outputs[0]
    finally:
        hook.remove()
    raise RuntimeError("a forward that does not come to the module")
