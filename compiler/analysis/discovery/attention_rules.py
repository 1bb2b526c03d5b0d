"""Label rules of attention, rotary embeddings and caches: heads stay apart, what is in one doesn't."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ...ir.graphs import name_of
from . import packed_rules
from .labelling import NO_LABEL, STREAM, Attention, tensors_in, unlabelled_like

if TYPE_CHECKING:
    from .labels import NodeRules


def label_rotary(step: "NodeRules") -> Any:
    """q, k or both, turned: the channels of a head mix. Angles have no labels."""
    turned = tuple(x for x in tensors_in(step.args) if (x > STREAM).any())
    for x in turned:
        step.out.couple_along(x, -1)
    if not isinstance(step.node.meta["dtype"], tuple):
        return turned[0]
    if len(turned) != len(step.node.meta["dtype"]):
        return step.block_unknown_operation(f"`{name_of(step.node)}`")
    return turned


def cache_update(step: "NodeRules") -> tuple[Tensor, Tensor]:
    return step.args[1], step.args[2]


def label_attention(step: "NodeRules") -> tuple[Tensor, None]:
    """q [b, h, t, d], k and v [b, kv, s, d] -> [b, t, h, d]: heads stay apart, what is in one doesn't."""
    module, q, k, v = step.args[:4]
    path = step.submodule_path(str(module.target)) if isinstance(module, fx.Node) else step.submodule_path("")
    heads = record_attention_call(step, path, q, k, v)
    b, _, t, _ = q.shape
    return heads[None, None, :, None].expand(b, t, -1, v.shape[-1]), None


def fused_attention(step: "NodeRules") -> Tensor:
    """torch's own, in the layout [b, h, t, d]."""
    q, k, v = step.args[:3]
    scope = step.node.meta.get("scope") or ("",)
    heads = record_attention_call(step, step.submodule_path(scope[-1]), q, k, v)
    return heads[None, :, None, None].expand(*q.shape[:-1], v.shape[-1])


def record_attention_call(step: "NodeRules", module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Note an attention call; returns a label per query head."""
    heads = [x.permute(1, 0, 2, 3).flatten(1) for x in (q, k, v)]  # [h, everything else]
    heads = [heads[0], *unrepeat_kv_heads(*map(clear_shared_channel_labels, heads[1:]))]
    for x in heads:
        step.out.couple_along(x, 1)
    q_heads, k_heads, v_heads = (x.amax(1) for x in heads)
    step.out.couple(k_heads, v_heads)
    if len(q_heads) == len(k_heads):
        step.out.couple(q_heads, k_heads)
    step.out.attentions.append(Attention(step.node, module, q_heads.numpy(), k_heads.numpy()))
    for w in packed_rules.weights_in((step.args[4:], step.kwargs)):  # a bias, looked up in a table, for each head
        packed_rules.couple_weights_along(step, w, 1, q_heads)
    further = {"mask": step.args[4], **step.kwargs} if len(step.args) > 4 else step.kwargs
    for name, other in further.items():
        couple_head_inputs(step, name, other, q_heads)
    return q_heads


def clear_shared_channel_labels(heads: Tensor) -> Tensor:
    """Keys or values [h, n] without the channels that all heads share, as the turned ones of latent attention."""
    shared = set(heads[0].unique().tolist()).intersection(*(x.unique().tolist() for x in heads[1:])) - {NO_LABEL}
    if len(heads) == 1 or not shared:
        return heads
    left = torch.where(torch.isin(heads, torch.tensor(sorted(shared))), NO_LABEL, heads)
    return left if bool((left > NO_LABEL).any(1).all()) else heads


def unrepeat_kv_heads(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """KV heads once each, where they were repeated for every query head that they serve."""
    same = [i for i in range(1, len(k)) if torch.equal(k[i], k[i - 1]) and torch.equal(v[i], v[i - 1])]
    each, left = divmod(len(k), len(k) - len(same))
    if left or same != [i for i in range(len(k)) if i % each]:
        return k, v
    return k[::each], v[::each]


def couple_head_inputs(step: "NodeRules", name: str, value: Any, heads: Tensor) -> None:
    """Meet the other inputs of attention: sinks [h] and biases [1, h, t, s] belong to their heads.

    A bias of constants has no labels, and every attention that is given it has as many heads: it gets some, in place,
    so that the next one meets them. One from outside of the graph can't follow.
    """
    source = step.node.kwargs.get(name, step.node.args[4] if len(step.node.args) > 4 else None)
    outside = isinstance(source, fx.Node) and source.op == "placeholder" and source.name not in step.run.arguments
    for x in tensors_in(value):
        if x.ndim == 1 and len(x) == len(heads):
            step.out.couple(x, heads)
        elif x.ndim == 4 and x.shape[1] == len(heads):
            if len(heads) > 1 and x.is_contiguous() and not (x > NO_LABEL).any():
                x.copy_(step.out.fresh(len(heads))[None, :, None, None])
                if outside:
                    step.out.block(x, f"`{source.name}`, from outside of the layer, has an entry for each of its heads")
            step.out.couple(x, heads[None, :, None, None])
        elif (x > STREAM).any():
            step.out.block((x, heads), f"attention is given `{name}`, whose heads are not known")


def masked(step: "NodeRules") -> Tensor:
    return step.label_pointwise(list(tensors_in(step.args)))


def sampled_positions(step: "NodeRules") -> Tensor:
    """Of x [b, t, d] some positions, for which logits are wanted: any of them stands for all."""
    x = step.args[0]
    step.out.couple_along(x, 1)
    return x.amax(1, keepdim=True).expand(step.node.meta["shape"])


def mask(step: "NodeRules") -> Tensor | None:
    """Made of sizes and padding."""
    return unlabelled_like(step.node.meta["shape"])


RULES = {
    "mask": mask,
    "masked": masked,
    "slice_logits": sampled_positions,
    "attention": label_attention,
    "cache_update": cache_update,
    "rotary": label_rotary,
    "scaled_dot_product_attention": fused_attention,
}
