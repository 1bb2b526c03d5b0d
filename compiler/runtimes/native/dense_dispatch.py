"""Experts that are given every token, times a score that is nothing for all but those that a router chose.

Such scores, the tokens that they multiply and what experts make of those are followed by the numbers of tokens and
experts, until a sum over the experts makes a token's numbers of them: a step of the chosen experts alone.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from . import calls, graph_values, mixtures, reductions, routers
from .plan_builder import PlanBuilder
from .rule import Call
from .values import DenseDispatch, Rows

_REASON = "scores of experts that are spent otherwise than on tokens for each of them"


def lower_dense_router(builder: PlanBuilder, call: Call) -> Any:
    """Scores of a router that gives one for each expert."""
    module, x = call.module, call.first
    if module is None or len(call.args) > 1 or call.kwargs:
        return NotImplemented
    scored = routers.recognise_dense_router(module, tuple(x.index.shape))
    if scored is None:
        return NotImplemented
    choice = mixtures.lower_choice(builder, call.node, module, x, {}, scored[0])
    tokens = builder.plan.layout.tokens
    scores = DenseDispatch(choice, torch.arange(tokens * choice.experts).view(tokens, choice.experts))
    return tuple(scores if i == scored[1] else choice for i in range(scored[1] + 2))


def lower_dense_dispatch(builder: PlanBuilder, call: Call) -> Any:
    node, role, args, kwargs, name, first = call.node, call.role, call.args, call.kwargs, call.name, call.first
    offers = [x for x in args if isinstance(x, DenseDispatch)]
    if name == "getitem" and isinstance(first, tuple | list):
        return first[args[1]]
    if name in calls.SIZE_CALLS and isinstance(first, DenseDispatch):
        return graph_values.lower_size_of(builder, call, first.index)
    if call.module and role == "experts" and offers == list(args) and not kwargs:
        return _expert_outputs(builder, node, call.module, first)
    if name in calls.SAME and isinstance(first, DenseDispatch):
        return first
    if name in calls.MOVES and isinstance(first, DenseDispatch):
        index = calls.run_on_indices(node, (first.index, *args[1:]), kwargs)
        if isinstance(index, Tensor):
            return DenseDispatch(first.choice, index, first.x, first.answers)
    if name in ("mul", "multiply") and len(offers) == 1 and offers[0].x is None:
        return _scale_tokens(builder, node, next(x for x in args if isinstance(x, Rows)), offers[0])
    if name == "sum" and isinstance(first, DenseDispatch) and first.answers is not None:
        return _sum_experts(builder, node, first, *args[1:], **kwargs)
    raise builder.rejection(node, _REASON)


def _scale_tokens(builder: PlanBuilder, node: fx.Node, x: Rows, scores: DenseDispatch) -> DenseDispatch:
    """Tokens, once for each expert, times its score."""
    experts, tokens = scores.choice.experts, builder.plan.layout.tokens
    index = builder.materialised(x).index
    if index.dim() != 2 or scores.index.shape != (len(index), 1) or len(index) != tokens * experts:
        raise builder.rejection(node, _REASON)
    token, expert = scores.index[:, 0] // experts, scores.index[:, 0] % experts
    token_index = index[expert == 0][token[expert == 0].argsort()]
    if not torch.equal(index, token_index[token]):
        raise builder.rejection(node, _REASON)
    width = index.shape[1]
    score_index = scores.index * width + torch.arange(width)
    return DenseDispatch(scores.choice, score_index, builder.register(Rows(token_index))[0])


def _expert_outputs(builder: PlanBuilder, node: fx.Node, module: nn.Module, offers: DenseDispatch) -> DenseDispatch:
    """Outputs of each expert for its rows, which are ordered by expert."""
    choice, plan, width = offers.choice, builder.plan, offers.index.shape[-1]
    expert = offers.index[:, 0] // width % choice.experts
    tokens = plan.layout.tokens
    in_order = torch.equal(expert, torch.arange(choice.experts).repeat_interleave(tokens))
    experts = (
        mixtures.recognise_sorted_experts(module, width, choice.experts) if in_order and offers.x is not None else None
    )
    if experts is None or offers.x is None:
        reason = f"a {type(module).__name__} computes something else than two layers for each expert"
        raise builder.rejection(node, reason)
    x = Rows(plan.layout.rows(offers.x).view(tokens, 1, width).expand(-1, choice.count, -1))
    weights = Rows(plan.layout.rows(choice.register)[:, : choice.count, None])
    weighted = builder.product(x, weights)
    register = mixtures.expert_outputs_register(builder, node, experts, choice, weighted, summed=False)
    parts = plan.layout.rows(register).view(tokens, choice.count, width)
    total = reductions.total(builder, [Rows(parts[:, i]) for i in range(choice.count)])
    return DenseDispatch(choice, offers.index, offers.x, builder.register(total)[0])


def _sum_experts(builder: PlanBuilder, node: fx.Node, offers: DenseDispatch, dim: Any = None, **_: Any) -> Rows:
    """A sum over all experts of each token."""
    axis = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    assert offers.answers is not None, "scores without answers"
    width, experts = builder.plan.layout.widths[offers.answers], offers.choice.experts
    index = offers.index.movedim(axis, 0) if isinstance(axis, int) else offers.index[:0]
    expert, token, column = index // width % experts, index // width // experts, index % width
    all_experts = torch.arange(experts).view(-1, *[1] * (index.dim() - 1)).expand_as(expert) if len(index) else expert
    covers_all = len(index) == experts and torch.equal(expert.sort(0).values, all_experts)
    if not covers_all or not all(torch.equal(x, x[:1].expand_as(x)) for x in (token, column)):
        raise builder.rejection(node, _REASON)
    return Rows(builder.rows(offers.answers)[token[0], column[0]])
