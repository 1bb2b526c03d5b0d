"""Label rules of attention, rotary embeddings and caches: heads stay apart, what is in one doesn't."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ...ir.graphs import target_name
from . import packed_rules
from .labelling import NO_LABEL, STREAM, Attention, tensors_in, unlabelled_like

if TYPE_CHECKING:
    from .labels import NodeRules


def label_rotary(rules: "NodeRules") -> Any:
    """q, k or both, turned: the channels of a head mix. Angles have no labels."""
    turned = tuple(x for x in tensors_in(rules.args) if (x > STREAM).any())
    for x in turned:
        rules.out.couple_along(x, -1)
    if not isinstance(rules.node.meta["dtype"], tuple):
        return turned[0]
    if len(turned) != len(rules.node.meta["dtype"]):
        return rules.block_unknown_operation(f"`{target_name(rules.node)}`")
    return turned


def label_cache_update(rules: "NodeRules") -> tuple[Tensor, Tensor]:
    return rules.args[1], rules.args[2]


def label_attention(rules: "NodeRules") -> tuple[Tensor, None]:
    """q [b, h, t, d], k and v [b, kv, s, d] -> [b, t, h, d]: heads stay apart, what is in one doesn't."""
    module, q, k, v = rules.args[:4]
    path = rules.submodule_path(str(module.target)) if isinstance(module, fx.Node) else rules.submodule_path("")
    heads = record_attention_call(rules, path, q, k, v)
    b, _, t, _ = q.shape
    return heads[None, None, :, None].expand(b, t, -1, v.shape[-1]), None


def label_fused_attention(rules: "NodeRules") -> Tensor:
    """torch's own, in the layout [b, h, t, d]."""
    q, k, v = rules.args[:3]
    scope = rules.node.meta.get("scope") or ("",)
    heads = record_attention_call(rules, rules.submodule_path(scope[-1]), q, k, v)
    return heads[None, :, None, None].expand(*q.shape[:-1], v.shape[-1])


def record_attention_call(rules: "NodeRules", module_path: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Note an attention call; returns a label per query head."""
    heads = [x.permute(1, 0, 2, 3).flatten(1) for x in (q, k, v)]  # [h, everything else]
    heads = [heads[0], *collapse_repeated_kv_heads(*map(clear_labels_common_to_all_heads, heads[1:]))]
    for x in heads:
        rules.out.couple_along(x, 1)
    q_heads, k_heads, v_heads = (x.amax(1) for x in heads)
    rules.out.couple(k_heads, v_heads)
    if len(q_heads) == len(k_heads):
        rules.out.couple(q_heads, k_heads)
    rules.out.attentions.append(Attention(rules.node, module_path, q_heads.numpy(), k_heads.numpy()))
    for w in packed_rules.weights_in((rules.args[4:], rules.kwargs)):  # a bias, looked up in a table, for each head
        packed_rules.couple_weights_along(rules, w, 1, q_heads)
    further = {"mask": rules.args[4], **rules.kwargs} if len(rules.args) > 4 else rules.kwargs
    for name, other in further.items():
        couple_sinks_and_biases_to_heads(rules, name, other, q_heads)
    return q_heads


def clear_labels_common_to_all_heads(heads: Tensor) -> Tensor:
    """Keys or values [h, n] without the channels that all heads share, as the turned ones of latent attention."""
    shared = set(heads[0].unique().tolist()).intersection(*(x.unique().tolist() for x in heads[1:])) - {NO_LABEL}
    if len(heads) == 1 or not shared:
        return heads
    left = torch.where(torch.isin(heads, torch.tensor(sorted(shared))), NO_LABEL, heads)
    return left if bool((left > NO_LABEL).any(1).all()) else heads


def collapse_repeated_kv_heads(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """KV heads once each, where they were repeated for every query head that they serve."""
    same = [i for i in range(1, len(k)) if torch.equal(k[i], k[i - 1]) and torch.equal(v[i], v[i - 1])]
    each, left = divmod(len(k), len(k) - len(same))
    if left or same != [i for i in range(len(k)) if i % each]:
        return k, v
    return k[::each], v[::each]


def couple_sinks_and_biases_to_heads(rules: "NodeRules", name: str, value: Any, heads: Tensor) -> None:
    """Meet the other inputs of attention: sinks [h] and biases [1, h, t, s] belong to their heads.

    A bias of constants has no labels, and every attention that is given it has as many heads: it gets some, in place,
    so that the next one meets them. One from outside of the graph can't follow.
    """
    source = rules.node.kwargs.get(name, rules.node.args[4] if len(rules.node.args) > 4 else None)
    outside = (
        isinstance(source, fx.Node) and source.op == "placeholder" and source.name not in rules.interpreter.arguments
    )
    for x in tensors_in(value):
        if x.ndim == 1 and len(x) == len(heads):
            rules.out.couple(x, heads)
        elif x.ndim == 4 and x.shape[1] == len(heads):
            if len(heads) > 1 and x.is_contiguous() and not (x > NO_LABEL).any():
                x.copy_(rules.out.new_labels(len(heads))[None, :, None, None])
                if outside:
                    rules.out.block_pruning_of(
                        x, f"`{source.name}`, from outside of the layer, has an entry for each of its heads"
                    )
            rules.out.couple(x, heads[None, :, None, None])
        elif (x > STREAM).any():
            rules.out.block_pruning_of((x, heads), f"attention is given `{name}`, whose heads are not known")


def label_mask_addition(rules: "NodeRules") -> Tensor:
    return rules.label_pointwise(list(tensors_in(rules.args)))


def label_padding_product(rules: "NodeRules") -> Tensor:
    """Hidden states [b, t, d] times a mask [b, t] of what is no padding."""
    return rules.args[0]


def label_selected_positions(rules: "NodeRules") -> Tensor:
    """Of x [b, t, d] some positions, for which logits are wanted: any of them stands for all."""
    x = rules.args[0]
    rules.out.couple_along(x, 1)
    return x.amax(1, keepdim=True).expand(rules.node.meta["shape"])


def label_mask(rules: "NodeRules") -> Tensor | None:
    """Made of sizes and padding."""
    return unlabelled_like(rules.node.meta["shape"])


RULES = {
    "mask": label_mask,
    "masked": label_mask_addition,
    "padding": label_padding_product,
    "slice_logits": label_selected_positions,
    "attention": label_attention,
    "cache_update": label_cache_update,
    "rotary": label_rotary,
    "scaled_dot_product_attention": label_fused_attention,
}
