"""Experts that are given every token, times a score that is nothing for all but those that a router chose.

Such scores, the tokens that they multiply and what experts make of those are followed by the numbers of tokens and
experts, until a sum over the experts makes a token's numbers of them: a step of the chosen experts alone.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from . import calls, mixtures, reductions
from .values import Chosen, Offers, Rows

if TYPE_CHECKING:
    from .reader import Reader

_WHY = "scores of experts that are spent otherwise than on tokens for each of them"


class Offering:
    """The part of a `Reader` that knows what becomes of such scores."""

    def __init__(self, reader: "Reader"):
        self.reader = reader

    def scores(self, choice: Chosen) -> Offers:
        tokens = self.reader.plan.layout.tokens
        return Offers(choice, torch.arange(tokens * choice.experts).view(tokens, choice.experts))

    def meet(self, node: fx.Node, role: str | None, args: Any, kwargs: Any) -> Any:
        name, first = calls.operation(node), args[0]
        offers = [x for x in args if isinstance(x, Offers)]
        if name == "getitem" and isinstance(first, tuple | list):
            return first[args[1]]
        if name in calls.ASKS and isinstance(first, Offers):
            return self.reader.size_of(node, first.index, args[1:])
        if role == "experts" and offers == list(args) and not kwargs:
            return self._answered(node, self.reader.model.get_submodule(str(node.target)), first)
        if name in calls.SAME and isinstance(first, Offers):
            return first
        if name in calls.MOVES and isinstance(first, Offers):
            moved = calls.moved(node, (first.index, *args[1:]), kwargs)
            if isinstance(moved, Tensor):
                return Offers(first.choice, moved, first.x, first.answers)
        if name in ("mul", "multiply") and len(offers) == 1 and offers[0].x is None:
            return self._offered(node, next(x for x in args if isinstance(x, Rows)), offers[0])
        if name == "sum" and isinstance(first, Offers) and first.answers is not None:
            return self._summed(node, first, *args[1:], **kwargs)
        raise self.reader.refuse(node, _WHY)

    def _offered(self, node: fx.Node, x: Rows, scores: Offers) -> Offers:
        """Tokens, once for each expert, times its score."""
        experts, tokens = scores.choice.experts, self.reader.plan.layout.tokens
        index = self.reader.settled(x).index
        if index.dim() != 2 or scores.index.shape != (len(index), 1) or len(index) != tokens * experts:
            raise self.reader.refuse(node, _WHY)
        token, expert = scores.index[:, 0] // experts, scores.index[:, 0] % experts
        own = index[expert == 0][token[expert == 0].argsort()]
        if not torch.equal(index, own[token]):
            raise self.reader.refuse(node, _WHY)
        width = index.shape[1]
        places = scores.index * width + torch.arange(width)
        return Offers(scores.choice, places, self.reader.register(Rows(own))[0])

    def _answered(self, node: fx.Node, module: nn.Module, given: Offers) -> Offers:
        """What each expert makes of its rows, which lie one expert after another."""
        choice, plan, width = given.choice, self.reader.plan, given.index.shape[-1]
        expert = given.index[:, 0] // width % choice.experts
        tokens = plan.layout.tokens
        in_order = torch.equal(expert, torch.arange(choice.experts).repeat_interleave(tokens))
        found = mixtures.recognise_rows(module, width, choice.experts) if in_order and given.x is not None else None
        if found is None or given.x is None:
            why = f"a {type(module).__name__} computes something else than two layers for each expert"
            raise self.reader.refuse(node, why)
        x = Rows(plan.layout.rows(given.x).view(tokens, 1, width).expand(-1, choice.count, -1))
        weights = Rows(plan.layout.rows(choice.register)[:, : choice.count, None])
        weighted = self.reader.computing.product(node, x, weights)
        made = self.reader.mixtures.answers(node, found, choice, weighted, summed=False)
        parts = plan.layout.rows(made).view(tokens, choice.count, width)
        whole = reductions.total(self.reader, node, [Rows(parts[:, i]) for i in range(choice.count)])
        return Offers(choice, given.index, given.x, self.reader.register(whole)[0])

    def _summed(self, node: fx.Node, made: Offers, dim: Any = None, **_: Any) -> Rows:
        """A sum over all experts of each token."""
        axis = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        assert made.answers is not None, "scores without answers"
        width, experts = self.reader.plan.layout.widths[made.answers], made.choice.experts
        index = made.index.movedim(axis, 0) if isinstance(axis, int) else made.index[:0]
        expert, token, column = index // width % experts, index // width // experts, index % width
        every = torch.arange(experts).view(-1, *[1] * (index.dim() - 1)).expand_as(expert) if len(index) else expert
        whole = len(index) == experts and torch.equal(expert.sort(0).values, every)
        if not whole or not all(torch.equal(x, x[:1].expand_as(x)) for x in (token, column)):
            raise self.reader.refuse(node, _WHY)
        return Rows(self.reader.plan.layout.rows(made.answers)[token[0], column[0]])
