"""Routers whose choice a layer writes out: shares, the best of them and their weights, in functions of torch.

What is made of a router's logits is followed until experts are given numbers and weights of it; then all of it is
tried on random rows as one router.
"""

from typing import Any

import torch
from torch import fx

from . import calls, graph_values, mixtures, routers
from .plan_builder import PlanBuilder
from .positional import call_node
from .rule import Call
from .values import ExpertChoice, RouterLogits, Rows

_ROWS = 64  # that a choice is tried on


def lower_inline_router(builder: PlanBuilder, call: Call) -> RouterLogits:
    """Logits of a router that returns those alone."""
    module, x = call.module, call.first
    alone = module is not None and len(call.args) == 1 and not call.kwargs
    if not alone or module is None or routers.sample_router(module, x.index.shape[-1], x.index.dim()) is None:
        reason = f"a {type(module).__name__} chooses experts in a way that the engine does not have"
        raise builder.rejection(call.node, reason)
    return RouterLogits(call.node)


def follows_router(builder: PlanBuilder, call: Call) -> bool:
    return RouterLogits in call.kinds and call.role != "experts"


def lower_router_logits(builder: PlanBuilder, call: Call) -> Any:
    if call.name in calls.SIZE_CALLS:
        return graph_values.lower_sample_size(builder, call)
    return RouterLogits(call.node)


def has_inline_choice(builder: PlanBuilder, call: Call) -> bool:
    return RouterLogits in call.kinds and call.role == "experts"


def lower_experts_of_inline_choice(builder: PlanBuilder, call: Call) -> Rows:
    """Outputs of experts whose choice was written out, with that choice as the one step that it is."""
    node = call.node
    nodes = [x for x in node.all_input_nodes if isinstance(builder.values[x], RouterLogits)]
    choices = _recognise_choices(builder, nodes) if len(nodes) == 2 else None
    if choices is None:
        raise builder.rejection(node, "experts are chosen in a way that the engine does not have")

    def operand(value: Any) -> Any:
        return choices[nodes.index(value.node)] if isinstance(value, RouterLogits) else value

    return mixtures.lower_experts(builder, call.mapped(operand))


@torch.no_grad()
def _recognise_choices(builder: PlanBuilder, nodes: list[fx.Node]) -> list[ExpertChoice] | None:
    """Choices that pairs of nodes are, indices and weights in their order; or None."""
    sources = {source for node in nodes for source in _source_routers(builder, node)}
    router = sources.pop()
    router_input = builder.values[router.args[0]] if isinstance(router.args[0], fx.Node) else None
    if sources or not isinstance(router_input, Rows):
        return None
    module, width = builder.model.get_submodule(str(router.target)), router_input.index.shape[-1]
    trial = routers.sample_router(module, width, router_input.index.dim())
    if trial is None:
        return None
    tensors, x, logits = trial
    try:
        outputs = [_run_nodes(builder, node, {router: logits}) for node in nodes]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for the sample's tokens
        return None
    kinds = [int(value.is_floating_point()) for value in outputs]
    if sorted(kinds) != [0, 1] or any(value.shape != outputs[0].shape or len(value) != _ROWS for value in outputs):
        return None
    numbers, weights = outputs[kinds.index(0)], outputs[kinds.index(1)]
    rule = routers.fit_routing(module, width, routers.Sample(tensors, x, weights.float(), numbers, (1, 0)))
    if rule is None:
        return None
    return mixtures.parts(builder, router, module, router_input, rule, [("numbers", "weights")[i] for i in kinds])


def _source_routers(builder: PlanBuilder, node: fx.Node) -> set[fx.Node]:
    """The routers that a value comes from."""
    origins, queue = set(), [node]
    while queue:
        current = queue.pop()
        inner = [x for x in current.all_input_nodes if isinstance(builder.values[x], RouterLogits)]
        queue += inner
        origins |= set() if inner else {current}
    return origins


def _run_nodes(builder: PlanBuilder, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node not in known:
        value = builder.values[node]
        if not isinstance(value, RouterLogits):
            return value
        args, kwargs = (fx.map_arg(part, lambda x: _run_nodes(builder, x, known)) for part in (node.args, node.kwargs))
        known[node] = call_node(node, builder.model, args, kwargs)
    return known[node]
