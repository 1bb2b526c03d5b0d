"""Steps of a mixture of experts: the choice of a router, by what it was for sampled rows, and layers of the chosen."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import linears, reductions, routers
from .experts import ExpertLayer, Experts
from .layout import IrregularColumns
from .plan import WeightEntry
from .plan_builder import PlanBuilder
from .rule import NodeCall
from .values import Rows

_ROWS = 64  # that a router is tried on, at least


@dataclass(frozen=True)
class ExpertChoice:
    """Register of a `route`: weights [tokens, count], then numbers of experts."""

    register: int
    count: int
    experts: int


class Router:
    """Router in a graph, with copies whose experts differ, or are nearly alike, to be run on random rows.

    x        rows that it is called with, tokens in their order; `extra` its other arguments
    samples  of each copy, one for each batch of tokens
    path     of the module; `owner` the innermost that runs it
    node     that a rejection names, with its reason
    choice   its steps, once there are any, by `rule`; `is_weighed`: weights were among what the rule was fitted to
    slots    of each sample the numbers [tokens, count] of experts whose outputs lie side by side, once there are any
    """

    def __init__(
        self, node: fx.Node, module: nn.Module, owner: nn.Module, x: Rows, extra: list[Tensor | None], tokens: int
    ):
        self.node, self.module, self.owner, self.x, self.extra = node, module, owner, x, extra
        self.path, self.reason = str(node.target), "experts are chosen in a way that the engine does not have"
        width = x.index.shape[-1]
        self.copies = [routers.RandomRouter(module, extra, width, spread) for spread in (1.0, 0.02)]
        self._batches = -(-_ROWS // tokens)
        self.samples = range(self._batches * len(self.copies))
        self.choice: ExpertChoice | None = None
        self.rule: routers.Routing | None = None
        self.is_weighed = False
        self.slots: list[Tensor] | None = None

    def copy(self, sample: int) -> routers.RandomRouter:
        return self.copies[sample // self._batches]


def random_sample_of_rows(builder: PlanBuilder, rows: Rows, sample_index: int) -> Tensor:
    """Random numbers of rows, equal where they are the same numbers of tokens."""
    index, layout = rows.index.reshape(-1), builder.plan.layout
    registers, _ = layout.registers_and_tokens(index)
    numbers = torch.zeros(len(index))
    for register in registers.unique().tolist():
        if register >= 0:  # else a token before a text, whose numbers are zeros
            generator = torch.Generator().manual_seed((sample_index << 20) + register)
            block = torch.randn(layout.tokens * layout.widths[register], generator=generator)
            of_register = registers == register
            numbers[of_register] = block[index[of_register] - layout.first_elements[register]]
    numbers = numbers.view(rows.index.shape)
    return numbers if rows.pending is None else rows.pending(numbers)


def infer_and_append_routing(
    builder: PlanBuilder, router: Router, indices_by_sample: list[Tensor], weights_by_sample: list[Tensor] | None
) -> ExpertChoice | None:
    """The steps of a choice by the first rule that fits all samples of a copy; None where there is none."""
    if weights_by_sample is not None and any(
        w.shape != n.shape for w, n in zip(weights_by_sample, indices_by_sample, strict=True)
    ):
        return None
    fits, width, rule = (routers.infer_routing, routers.infer_sequential_routing), router.x.index.shape[-1], None
    for copy, fit in zip(router.copies, fits, strict=True):
        samples = [s for s in router.samples if router.copy(s) is copy]
        x = torch.cat([random_sample_of_rows(builder, router.x, s).reshape(-1, width) for s in samples])
        weight = None if weights_by_sample is None else torch.cat([weights_by_sample[s] for s in samples]).float()
        sample = routers.RoutingSample(copy.tensors, x, torch.cat([indices_by_sample[s] for s in samples]), weight)
        rule = rule or fit(router.owner, sample)
    if rule is None:
        return None
    fields = {"kind": rule.kind, "normal": rule.normal, "eps": rule.eps, "scale": rule.scale}
    if router.choice is None:
        router.choice, router.rule, router.is_weighed = _append_route_step(builder, router, rule, fields), rule, False
    elif weights_by_sample is not None and rule != router.rule:
        if router.is_weighed or router.rule is None or rule.choice != router.rule.choice:
            return None  # one router, and two choices
        register = router.choice.register  # of a choice of which the numbers alone were known
        next(step for step in builder.plan.steps if step.get("to") == register).update(fields)
        router.rule = rule
    router.is_weighed = router.is_weighed or weights_by_sample is not None
    return router.choice


def _append_route_step(
    builder: PlanBuilder, router: Router, rule: routers.Routing, fields: dict[str, Any]
) -> ExpertChoice:
    plan, path, tensors = builder.plan, router.path, routers.named_tensors(router.module, router.extra)
    weight, experts = plan.add_vector(f"{path}.{rule.weight}", tensors[rule.weight]), len(tensors[rule.weight])
    bias, correction_bias = (
        None if name is None else plan.add_vector(f"{path}.{name}", tensors[name].flatten())
        for name in (rule.bias, rule.correction_bias)
    )
    scores = plan.append_step(
        "scores", experts, x=_register_in_token_order(builder, router.x), weight=weight, bias=bias
    )
    groups = {"groups": rule.groups, "kept": rule.n_groups_chosen, "judges": rule.scores_per_group}
    register = plan.append_step(
        "route", 2 * rule.count, x=scores, bias=correction_bias, count=rule.count, **groups, **fields
    )
    return ExpertChoice(register, rule.count, experts)


def _register_in_token_order(builder: PlanBuilder, value: Rows) -> int:
    """The register of a value that has its tokens in order."""
    register, lane = builder.register(value)
    if not torch.equal(lane.order, torch.arange(len(lane.order))):
        raise IrregularColumns
    return register


def append_expert_outputs(
    builder: PlanBuilder, node: fx.Node, experts: Experts, choice: ExpertChoice, value: Rows, *, summed: bool
) -> int:
    """The register of outputs of the chosen experts for a value of each token, or one for each of them."""
    x = _register_in_token_order(builder, value)
    for layer, middle in zip(experts.layers, (*experts.middles, None), strict=True):
        x = _append_expert_layer(builder, layer, choice, x, summed=summed and middle is None)
        if middle is not None:
            rows = Rows(builder.rows(x).view(builder.plan.layout.tokens * choice.count, -1))
            x = _register_in_token_order(builder, _lower_expert_activation(builder, node, middle, rows))
    return x


def append_outputs_of_weighted_input(
    builder: PlanBuilder, node: fx.Node, experts: Experts, choice: ExpertChoice, value: Rows
) -> int:
    """The register of a sum of the chosen experts, for a value times the weight of each."""
    weights = Rows(builder.rows(choice.register)[:, : choice.count, None])
    weighed = builder.product(Rows(value.index[:, None].expand(-1, choice.count, -1), value.pending), weights)
    register = append_expert_outputs(builder, node, experts, choice, weighed, summed=False)
    parts = builder.rows(register).view(len(value.index), choice.count, -1)
    return builder.register(reductions.total(builder, [Rows(parts[:, i]) for i in range(choice.count)]))[0]


def add_identity_experts(
    builder: PlanBuilder, choice: ExpertChoice, n_real_experts: int, x: Rows, output: Rows
) -> Rows:
    """Outputs of experts on x, plus x times the weights of identity experts."""
    parts = builder.rows(choice.register)
    weights, numbers = parts[:, : choice.count], parts[:, choice.count :]
    above = builder.apply(Rows(numbers), operator.sub, float(n_real_experts - 1))
    idle = builder.apply(above, torch.clamp, 0.0, 1.0)  # one of those, else zero
    shares = builder.product(idle, Rows(weights))
    share = reductions.total(builder, [Rows(shares.index[:, i : i + 1]) for i in range(choice.count)])
    spread = Rows(share.index.view(*x.index.shape[:-1], 1))
    return builder.elementwise_of_two("add", output, builder.product(x, spread))


def _append_expert_layer(
    builder: PlanBuilder, layer: ExpertLayer, choice: ExpertChoice, register: int, *, summed: bool
) -> int:
    plan, formats = builder.plan, builder.formats
    names, zero_weights = [], tuple(torch.zeros_like(w[0]) for w in layer.weights)  # of experts that are not there
    for expert in range(choice.experts):
        expert_weights = tuple(w[expert] for w in layer.weights if expert < len(w))
        linear = linears.Stacked(expert_weights or zero_weights)
        entry = WeightEntry("packed", linear.shape, linear.make_packer(formats.weights, formats.group))
        names.append(plan.add_weight_entry(f"{layer.name}.{expert}.weight", entry, linear.key))
    width = layer.outputs * (1 if summed else choice.count)
    biases = None if layer.bias is None else plan.add_vector(f"{layer.name}.biases", layer.bias)
    return plan.append_step(
        "experts", width, x=register, chosen=choice.register, weights=names, biases=biases, summed=summed
    )


def _lower_expert_activation(builder: PlanBuilder, node: fx.Node, graph: fx.GraphModule, rows: Rows) -> Rows:
    """Lower the operations between the layers of an expert, step by step."""
    values: dict[fx.Node, Any] = {}
    for inner in graph.graph.nodes:
        args, kwargs = fx.map_arg((inner.args, inner.kwargs), values.__getitem__)
        if inner.op == "output":
            return args[0]
        if inner.op == "placeholder":
            values[inner] = rows
        elif inner.op == "get_attr":
            values[inner] = getattr(graph, inner.target)
        else:
            part = graph.get_submodule(inner.target) if inner.op == "call_module" else None
            inner.meta = node.meta | inner.meta
            role = None if part is None else "activation"
            values[inner] = builder.lower(NodeCall(inner, args, kwargs, role, part))
    raise AssertionError(f"the middle of {node.target} has no output")
