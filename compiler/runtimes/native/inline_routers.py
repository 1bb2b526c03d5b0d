"""Routers whose choice a layer writes out: shares, the best of them and their weights, in functions of torch.

What is made of a router's logits is followed until experts are given numbers and weights of it; then all of it is
tried on random rows as one router.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from . import calls, routers
from .positional import call_node
from .trees import mapped
from .values import ExpertChoice, RouterLogits, Rows

if TYPE_CHECKING:
    from .reader import Reader

_ROWS = 64  # that a choice is tried on


class InlineRouterRules:
    """The part of a `Reader` that follows a router's logits."""

    def __init__(self, reader: "Reader"):
        self.reader = reader

    def begin(self, node: fx.Node, module: nn.Module, x: Rows) -> RouterLogits:
        """Start reading a router that returns logits alone."""
        if routers.sample_router(module, x.index.shape[-1], x.index.dim()) is None:
            reason = f"a {type(module).__name__} chooses experts in a way that the engine does not have"
            raise self.reader.rejection(node, reason)
        return RouterLogits(node)

    def lower(self, node: fx.Node, args: Any) -> Any:
        if calls.operation(node) in calls.SIZE_CALLS:
            return self.reader.sample_size(node, args)
        return RouterLogits(node)

    def resolve_choices(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments of experts, with the choice that was written out as the one step that it is."""
        nodes = [x for x in node.all_input_nodes if isinstance(self.reader.values[x], RouterLogits)]
        if not nodes:
            return args, kwargs
        choices = self._recognise_choices(nodes) if len(nodes) == 2 else None
        if choices is None:
            raise self.reader.rejection(node, "experts are chosen in a way that the engine does not have")

        def operand(value: Any) -> Any:
            return choices[nodes.index(value.node)] if isinstance(value, RouterLogits) else value

        return mapped(args, operand), mapped(kwargs, operand)

    @torch.no_grad()
    def _recognise_choices(self, nodes: list[fx.Node]) -> list[ExpertChoice] | None:
        """Choices that pairs of nodes are, indices and weights in their order; or None."""
        sources = {source for node in nodes for source in self._source_routers(node)}
        router = sources.pop()
        router_input = self.reader.values[router.args[0]] if isinstance(router.args[0], fx.Node) else None
        if sources or not isinstance(router_input, Rows):
            return None
        module, width = self.reader.model.get_submodule(str(router.target)), router_input.index.shape[-1]
        trial = routers.sample_router(module, width, router_input.index.dim())
        if trial is None:
            return None
        tensors, x, logits = trial
        try:
            outputs = [self._run_nodes(node, {router: logits}) for node in nodes]
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for the sample's tokens
            return None
        kinds = [int(value.is_floating_point()) for value in outputs]
        if sorted(kinds) != [0, 1] or any(value.shape != outputs[0].shape or len(value) != _ROWS for value in outputs):
            return None
        numbers, weights = outputs[kinds.index(0)], outputs[kinds.index(1)]
        rule = routers.fit_routing(module, width, routers.Sample(tensors, x, weights.float(), numbers, (1, 0)))
        if rule is None:
            return None
        return self.reader.mixtures.parts(
            router, module, router_input, rule, [("numbers", "weights")[i] for i in kinds]
        )

    def _source_routers(self, node: fx.Node) -> set[fx.Node]:
        """The routers that a value comes from."""
        origins, queue = set(), [node]
        while queue:
            current = queue.pop()
            inner = [x for x in current.all_input_nodes if isinstance(self.reader.values[x], RouterLogits)]
            queue += inner
            origins |= set() if inner else {current}
        return origins

    def _run_nodes(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        if node not in known:
            value = self.reader.values[node]
            if not isinstance(value, RouterLogits):
                return value
            args, kwargs = (fx.map_arg(part, lambda x: self._run_nodes(x, known)) for part in (node.args, node.kwargs))
            known[node] = call_node(node, self.reader.model, args, kwargs)
        return known[node]
