"""What attention, rotary embeddings and caches do with labels: heads stay apart, what is in one doesn't."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from .labelling import STREAM, Attention, name_of, tensors_in

if TYPE_CHECKING:
    from .labels import _Step as Step


def rotary(step: "Step") -> Any:
    """q, k or both, turned: the channels of a head mix. Angles have no labels."""
    turned = tuple(x for x in tensors_in(step.args) if (x > STREAM).any())
    for x in turned:
        step.out.couple_along(x, -1)
    if not isinstance(step.node.meta["dtype"], tuple):
        return turned[0]
    if len(turned) != len(step.node.meta["dtype"]):
        return step.unknown(f"`{name_of(step.node)}`")
    return turned


def cache_update(step: "Step") -> tuple[Tensor, Tensor]:
    return step.args[1], step.args[2]


def attention(step: "Step") -> tuple[Tensor, None]:
    """q [b, h, t, d], k and v [b, kv, s, d] -> [b, t, h, d]: heads stay apart, what is in one doesn't."""
    module, q, k, v = step.args[:4]
    path = step.below(module.target) if isinstance(module, fx.Node) else step.below("")
    heads = attend(step, path, q, k, v)
    b, _, t, _ = q.shape
    return heads[None, None, :, None].expand(b, t, -1, v.shape[-1]), None


def fused_attention(step: "Step") -> Tensor:
    """torch's own, in the layout [b, h, t, d]."""
    q, k, v = step.args[:3]
    scope = step.node.meta.get("scope") or ("",)
    heads = attend(step, step.below(scope[-1]), q, k, v)
    return heads[None, :, None, None].expand(*q.shape[:-1], v.shape[-1])


def attend(step: "Step", module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Note an attention call; returns a label per query head."""
    heads = [x.permute(1, 0, 2, 3).flatten(1) for x in (q, k, v)]      # [h, everything else]
    for x in heads:
        step.out.couple_along(x, 1)
    q_heads, k_heads, v_heads = (x.amax(1) for x in heads)
    step.out.couple(k_heads, v_heads)
    if len(q_heads) == len(k_heads):
        step.out.couple(q_heads, k_heads)
    step.out.attentions.append(Attention(step.node, module, q_heads.numpy(), k_heads.numpy()))
    for name, other in step.kwargs.items():
        hear(step, name, other, q_heads)
    return q_heads


def hear(step: "Step", name: str, other: Any, heads: Tensor) -> None:
    """What else attention is given: sinks [h] and biases [1, h, t, s] belong to their heads."""
    for x in tensors_in(other):
        if x.ndim == 1 and len(x) == len(heads):
            step.out.couple(x, heads)
        elif x.ndim == 4 and x.shape[1] == len(heads):
            step.out.couple(x, heads[None, :, None, None])
        elif (x > STREAM).any():
            step.out.block((x, heads), f"attention is given `{name}`, whose heads are not known")


RULES = {"attention": attention, "cache_update": cache_update, "rotary": rotary,
         "scaled_dot_product_attention": fused_attention}
