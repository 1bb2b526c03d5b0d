"""Experts that are given every token, times a score that is nothing for all but those that a router chose.

Such scores, the tokens that they multiply and what experts make of those are followed by the numbers of tokens and
experts, until a sum over the experts makes a token's numbers of them: a step of the chosen experts alone.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from . import calls, mixtures, reductions
from .values import DenseDispatch, ExpertChoice, Rows

if TYPE_CHECKING:
    from .reader import Reader

_REASON = "scores of experts that are spent otherwise than on tokens for each of them"


class DenseDispatchRules:
    """The part of a `Reader` that knows what becomes of such scores."""

    def __init__(self, reader: "Reader"):
        self.reader = reader

    def scores(self, choice: ExpertChoice) -> DenseDispatch:
        tokens = self.reader.plan.layout.tokens
        return DenseDispatch(choice, torch.arange(tokens * choice.experts).view(tokens, choice.experts))

    def lower(self, node: fx.Node, role: str | None, args: Any, kwargs: Any) -> Any:
        name, first = calls.operation(node), args[0]
        offers = [x for x in args if isinstance(x, DenseDispatch)]
        if name == "getitem" and isinstance(first, tuple | list):
            return first[args[1]]
        if name in calls.SIZE_CALLS and isinstance(first, DenseDispatch):
            return self.reader.size_of(node, first.index, args[1:])
        if role == "experts" and offers == list(args) and not kwargs:
            return self._expert_outputs(node, self.reader.model.get_submodule(str(node.target)), first)
        if name in calls.SAME and isinstance(first, DenseDispatch):
            return first
        if name in calls.MOVES and isinstance(first, DenseDispatch):
            index = calls.run_on_indices(node, (first.index, *args[1:]), kwargs)
            if isinstance(index, Tensor):
                return DenseDispatch(first.choice, index, first.x, first.answers)
        if name in ("mul", "multiply") and len(offers) == 1 and offers[0].x is None:
            return self._scale_tokens(node, next(x for x in args if isinstance(x, Rows)), offers[0])
        if name == "sum" and isinstance(first, DenseDispatch) and first.answers is not None:
            return self._sum_experts(node, first, *args[1:], **kwargs)
        raise self.reader.rejection(node, _REASON)

    def _scale_tokens(self, node: fx.Node, x: Rows, scores: DenseDispatch) -> DenseDispatch:
        """Tokens, once for each expert, times its score."""
        experts, tokens = scores.choice.experts, self.reader.plan.layout.tokens
        index = self.reader.materialised(x).index
        if index.dim() != 2 or scores.index.shape != (len(index), 1) or len(index) != tokens * experts:
            raise self.reader.rejection(node, _REASON)
        token, expert = scores.index[:, 0] // experts, scores.index[:, 0] % experts
        token_index = index[expert == 0][token[expert == 0].argsort()]
        if not torch.equal(index, token_index[token]):
            raise self.reader.rejection(node, _REASON)
        width = index.shape[1]
        score_index = scores.index * width + torch.arange(width)
        return DenseDispatch(scores.choice, score_index, self.reader.register(Rows(token_index))[0])

    def _expert_outputs(self, node: fx.Node, module: nn.Module, offers: DenseDispatch) -> DenseDispatch:
        """Outputs of each expert for its rows, which are ordered by expert."""
        choice, plan, width = offers.choice, self.reader.plan, offers.index.shape[-1]
        expert = offers.index[:, 0] // width % choice.experts
        tokens = plan.layout.tokens
        in_order = torch.equal(expert, torch.arange(choice.experts).repeat_interleave(tokens))
        experts = (
            mixtures.recognise_sorted_experts(module, width, choice.experts)
            if in_order and offers.x is not None
            else None
        )
        if experts is None or offers.x is None:
            reason = f"a {type(module).__name__} computes something else than two layers for each expert"
            raise self.reader.rejection(node, reason)
        x = Rows(plan.layout.rows(offers.x).view(tokens, 1, width).expand(-1, choice.count, -1))
        weights = Rows(plan.layout.rows(choice.register)[:, : choice.count, None])
        weighted = self.reader.computing.product(node, x, weights)
        register = self.reader.mixtures.expert_outputs_register(node, experts, choice, weighted, summed=False)
        parts = plan.layout.rows(register).view(tokens, choice.count, width)
        total = reductions.total(self.reader, node, [Rows(parts[:, i]) for i in range(choice.count)])
        return DenseDispatch(choice, offers.index, offers.x, self.reader.register(total)[0])

    def _sum_experts(self, node: fx.Node, offers: DenseDispatch, dim: Any = None, **_: Any) -> Rows:
        """A sum over all experts of each token."""
        axis = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        assert offers.answers is not None, "scores without answers"
        width, experts = self.reader.plan.layout.widths[offers.answers], offers.choice.experts
        index = offers.index.movedim(axis, 0) if isinstance(axis, int) else offers.index[:0]
        expert, token, column = index // width % experts, index // width // experts, index % width
        all_experts = (
            torch.arange(experts).view(-1, *[1] * (index.dim() - 1)).expand_as(expert) if len(index) else expert
        )
        covers_all = len(index) == experts and torch.equal(expert.sort(0).values, all_experts)
        if not covers_all or not all(torch.equal(x, x[:1].expand_as(x)) for x in (token, column)):
            raise self.reader.rejection(node, _REASON)
        return Rows(self.reader.plan.layout.rows(offers.answers)[token[0], column[0]])
