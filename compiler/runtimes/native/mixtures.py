"""Mixtures of experts, recognised by what they compute between a router and the sum of what experts make.

A value in this region is known by what it is for sampled rows: it comes of a copy of the router with random weights,
and of random numbers in place of what experts make of a row. So the numbers and weights of the experts that a router
chose are read off the arguments of their module, or off a sum of those random numbers: whatever a layer does between
them, sorting its rows by experts or handing all rows to all of them, ends in the same steps.
"""

from dataclasses import dataclass, replace
from functools import partial
from types import NotImplementedType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import calls, expert_steps
from .expert_steps import Router, random_sample_of_rows
from .experts import Assignment, Experts, recognise_dispatched_experts, recognise_experts
from .plan_builder import PlanBuilder
from .positional import call_in_float32
from .rule import NodeCall
from .values import Routed, Rows

_ATOL = 1e-4  # of numbers of size one
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)  # of code that is made for something else


@dataclass(frozen=True)
class DispatchedRows:
    """Rows that are given to one expert each, those of zeros left out.

    rows     [n] among all that were given
    tokens   [n] of which they are multiples, by `scales`
    numbers  [n] of their experts
    answers  random numbers in place of what experts make [all rows, out], zeros of zeros
    """

    rows: Tensor
    tokens: Tensor
    numbers: Tensor
    scales: Tensor
    answers: Tensor

    def row_numbers_by_token(self, num_tokens: int) -> Tensor | None:
        """[num_tokens, count] of the rows in the order of tokens, where each has as many; else None."""
        order = self.tokens.argsort(stable=True)
        expected = torch.arange(num_tokens).repeat_interleave(len(order) // num_tokens)
        return order.view(num_tokens, -1) if torch.equal(self.tokens[order], expected) else None


@dataclass(frozen=True)
class Dispatch:
    """Call of experts on such rows; x [tokens, in], or [tokens, count * in] of what each expert of a token takes."""

    node: fx.Node
    experts: Experts
    x: Rows
    samples: list[DispatchedRows]


def lower_router(builder: PlanBuilder, call: NodeCall) -> Routed:
    value = _evaluate_router_on_samples(builder, call)
    if value is None:
        reason = f"a {type(call.module).__name__} chooses experts in a way that the engine does not have"
        raise builder.rejection(call.node, reason)
    return value


def evaluate_if_renamed_router(builder: PlanBuilder, call: NodeCall) -> "Routed | NotImplementedType":
    """Outputs of a router that is called something else: of rows [n, width], numbers that are counted among them.

    NotImplemented where the module is none.
    """
    is_layer = call.role in ("linear", "norm", "activation")
    if is_layer or len(call.args) != 1 or not isinstance(call.first, Rows) or call.first.index.dim() != 2:
        return NotImplemented
    value = _evaluate_router_on_samples(builder, call)
    if value is None or not isinstance(value.samples[0], tuple):
        return NotImplemented
    has_indices = any(isinstance(x, Tensor) and not x.is_floating_point() for x in value.samples[0])
    return value if has_indices else NotImplemented


def _evaluate_router_on_samples(builder: PlanBuilder, call: NodeCall) -> Routed | None:
    """Samples of what a router gives, None where it takes something else than rows and constants."""
    if call.module is None or call.kwargs or any(not isinstance(x, Tensor | None) for x in call.args[1:]):
        return None
    scope = call.node.meta.get("scope", ())
    owner = builder.model.get_submodule(scope[-1]) if call.role == "linear" and scope else call.module
    router = Router(call.node, call.module, owner, call.first, list(call.args[1:]), builder.plan.layout.tokens)
    try:
        return Routed(router, [router.copy(s)(random_sample_of_rows(builder, router.x, s)) for s in router.samples])
    except _ERRORS:
        return None


def lower_function_of_logits(builder: PlanBuilder, call: NodeCall) -> Any:
    """Value of a function without a step, whose operand may be the logits that a linear layer makes for a choice."""
    reason = f"`{call.name}` of numbers that differ from token to token is not among the engine's steps"
    logits = _router_logits_on_samples(builder, call.node.all_input_nodes[0])
    if logits is None:
        return NotImplemented
    logits.router.node, logits.router.reason = call.node, reason
    return lower_after_router(builder, replace(call, args=(logits, *call.args[1:])))


def _router_logits_on_samples(builder: PlanBuilder, node: fx.Node) -> Routed | None:
    """Value of a node behind a linear layer, as that of a router; None where another module made it."""
    call = builder.resolve_call(node)
    if not isinstance(call.first, Rows):
        return None
    if call.module is None:
        first = _router_logits_on_samples(builder, node.all_input_nodes[0])
        value = None if first is None else lower_after_router(builder, replace(call, args=(first, *call.args[1:])))
    else:
        value = _evaluate_router_on_samples(builder, call) if call.role == "linear" else None
    if isinstance(value, Routed):
        builder.values[node] = value  # others read it as well
        return value
    return None


@torch.no_grad()
def lower_after_router(builder: PlanBuilder, call: NodeCall) -> Any:
    """Value of a call behind a router, or the rows of tokens that a sum of experts gives."""
    routed = [x for x in call.operands if isinstance(x, Routed)]
    router = routed[0].router
    if call.module is None and call.name in calls.SIZE_CALLS:
        return call_in_float32(call.node, builder.model, (routed[0].samples[0], *call.args[1:]), call.kwargs)
    is_layer = call.module is not None and call.role != "experts" and any(True for _ in call.module.parameters())
    if is_layer or any(x.router is not router for x in routed):
        raise builder.rejection(router.node, router.reason)
    lower = _lower_experts_or_reject if call.role == "experts" else _evaluate_on_samples
    value = lower(builder, call, router)
    for node in call.node.all_input_nodes:  # rows of every expert, in every layer: those that nobody reads again go
        read = builder.values[node]
        if isinstance(read, Routed) and all(user is call.node or user in builder.values for user in node.users):
            read.samples.clear()
    return value


def _evaluate_on_samples(builder: PlanBuilder, call: NodeCall, router: Router) -> Routed | Rows:
    """Value of a function of values behind a router, computed for each sample."""
    routed = [x for x in call.operands if isinstance(x, Routed)]

    def operand(sample: int, value: Any) -> Any:
        if isinstance(value, Routed):
            return value.samples[sample]
        return random_sample_of_rows(builder, value, sample) if isinstance(value, Rows) else value

    try:
        operands = [call.mapped(partial(operand, s)) for s in router.samples]
        samples = [call_in_float32(call.node, builder.model, x.args, x.kwargs) for x in operands]
    except _ERRORS:
        raise builder.rejection(call.node, router.reason) from None
    inputs = (*(x for x in call.operands if isinstance(x, Rows)), *(rows for x in routed for rows in x.inputs))
    dispatch = next((x.dispatch for x in reversed(routed) if x.dispatch is not None), None)
    return _lower_if_expert_result(builder, Routed(router, samples, inputs, dispatch))


# -- experts -------------------------------------------------------------------------------------------------


def _lower_experts_or_reject(builder: PlanBuilder, call: NodeCall, router: Router) -> Routed | Rows:
    """Outputs of experts: their sum, where a module is handed numbers and weights, else rows of each."""
    order: list[str] = [_operand_kind(x) for x in (*call.args, *call.kwargs.values())]
    is_sum = sorted(order) == ["numbers", "weights", "x"]
    value = (_lower_weighted_experts if is_sum else _lower_grouped_experts)(builder, call, router, order)
    if value is None:
        reason = f"a {type(call.module).__name__} computes something else than layers for each expert"
        raise builder.rejection(call.node, reason)
    return value


def _operand_kind(value: Any) -> Literal["x", "weights", "numbers", "sizes", ""]:
    if isinstance(value, Rows):
        return "x"
    sample = value.samples[0] if isinstance(value, Routed) else None
    if isinstance(sample, Tensor) and sample.dim() == 2:
        return "weights" if sample.is_floating_point() else "numbers"
    return "sizes" if isinstance(value, Routed) else ""


def _lower_weighted_experts(
    builder: PlanBuilder, call: NodeCall, router: Router, operand_kinds: list[str]
) -> Rows | None:
    named = dict(zip(operand_kinds, (*call.args, *call.kwargs.values()), strict=True))
    x, first = named["x"], len(call.args)
    choice = expert_steps.infer_and_append_routing(builder, router, named["numbers"].samples, named["weights"].samples)
    if choice is None:
        raise builder.rejection(call.node, router.reason)

    def run(module: nn.Module, batch: Assignment) -> Tensor:
        values = [{"x": batch.x, "numbers": batch.numbers, "weights": batch.weights}[name] for name in operand_kinds]
        return module(*values[:first], **dict(zip(call.kwargs, values[first:], strict=True)))

    assert call.module is not None, f"{call.node.name} calls no module"
    experts = recognise_experts(call.module, x.index.shape[-1], choice.experts, run)
    if experts is None:
        return None
    experts = experts.with_layer_prefix(str(call.node.target))
    output = Rows(builder.rows(expert_steps.append_expert_outputs(builder, call.node, experts, choice, x, summed=True)))
    output = Rows(output.index.view(x.index.shape))
    return expert_steps.add_identity_experts(builder, choice, experts.count, x, output) if experts.idle else output


def _lower_grouped_experts(
    builder: PlanBuilder, call: NodeCall, router: Router, operand_kinds: list[str]
) -> Routed | Rows | None:
    """Outputs of rows in the order of their experts, with or without how many of them each expert takes."""
    if operand_kinds not in (["weights"], ["weights", "sizes"]) or call.kwargs or call.module is None:
        return None
    rows, sizes = (*call.args, None)[:2]
    count = next((len(p) for p in call.module.parameters() if p.dim() == 3), 0)

    def run(module: nn.Module, batch: Assignment) -> Tensor:
        return module(batch.x, *([] if sizes is None else [batch.numbers.flatten().bincount().tolist()]))

    experts = recognise_dispatched_experts(call.module, rows.samples[0].shape[1], count, run) if count else None
    if experts is None:
        return None
    experts = experts.with_layer_prefix(str(call.node.target))
    numbers = []
    for s, value in enumerate(rows.samples):
        try:
            lengths = torch.as_tensor(len(value) // count if sizes is None else sizes.samples[s])
            numbers.append(torch.arange(count).repeat_interleave(lengths))
        except _ERRORS:  # numbers of something else
            return None
        if len(numbers[-1]) != len(value):
            return None
    if rows.dispatch is not None:
        dispatch = _chain_expert_layer(builder, call.node, rows, experts, numbers)
    else:
        dispatches = (_first_dispatch(builder, call.node, x, rows, experts, numbers) for x in (*rows.inputs, router.x))
        dispatch = next((x for x in dispatches if x is not None), None)
    if dispatch is None:
        return None
    return _lower_if_expert_result(
        builder, Routed(router, [sample.answers for sample in dispatch.samples], (), dispatch)
    )


def _first_dispatch(
    builder: PlanBuilder, node: fx.Node, x: Rows, routed: Routed, experts: Experts, expert_indices: list[Tensor]
) -> Dispatch | None:
    """Call of experts on rows that are multiples of x's; None where they are something else."""
    width, tokens = routed.samples[0].shape[1], builder.plan.layout.tokens
    if x.index.shape[-1] != width:
        return None
    index = builder.materialised(x).index.reshape(-1, width)
    _, token = builder.plan.layout.registers_and_tokens(index[:, 0])
    order = token.argsort(stable=True)
    if not torch.equal(token[order], torch.arange(tokens).repeat_interleave(len(token) // tokens)):
        return None
    by_token = index[order].view(tokens, -1, width)
    is_token = torch.equal(by_token, by_token[:, :1].expand_as(by_token))  # every expert takes the token itself
    generator, samples = torch.Generator().manual_seed(0), []
    for s, value in enumerate(routed.samples):
        table = random_sample_of_rows(builder, x, s).reshape(-1, width)
        row = (F.normalize(value) @ F.normalize(table).T).abs().argmax(1)
        scale = (value * table[row]).sum(1) / table[row].square().sum(1)
        if not torch.allclose(value, table[row] * scale[:, None], atol=_ATOL):
            return None
        slots = routed.router.slots
        expected = None if is_token or slots is None else slots[s].flatten()[order.argsort()[row]]
        active = scale.abs() > _ATOL
        if not (is_token or (expected is not None and torch.equal(expected, expert_indices[s]))):
            return None
        if not (bool(active.all()) or experts.keeps_zeros):
            return None
        answers = torch.randn(len(value), experts.outputs, generator=generator) * active[:, None]
        rows_of, of_experts = active.nonzero()[:, 0], expert_indices[s][active]
        samples.append(DispatchedRows(rows_of, token[row][active], of_experts, scale[active], answers))
    return Dispatch(node, experts, Rows(by_token[:, 0] if is_token else by_token.flatten(1)), samples)


def _chain_expert_layer(
    builder: PlanBuilder, node: fx.Node, routed: Routed, experts: Experts, expert_indices: list[Tensor]
) -> Dispatch | None:
    """Call of a layer more of the same experts, behind functions of each row; None where it is something else."""
    last_dispatch, generator, samples = routed.dispatch, torch.Generator().manual_seed(1), []
    middle = _subgraph_between(builder, last_dispatch.node, node.all_input_nodes[0])
    if middle is None:
        return None
    for sample, value, number in zip(last_dispatch.samples, routed.samples, expert_indices, strict=True):
        answers, is_alike = sample.answers, _are_ones(sample.scales) and torch.equal(sample.numbers, number)
        if not is_alike or len(answers) != len(value):
            return None
        if not torch.allclose(middle(answers.flip(0)).flip(0), value, atol=_ATOL):  # each row by itself
            return None
        samples.append(replace(sample, answers=torch.randn(len(value), experts.outputs, generator=generator)))
    layers = (*last_dispatch.experts.layers, *experts.layers)
    return Dispatch(
        node, Experts(layers, (*last_dispatch.experts.middles, middle, *experts.middles)), last_dispatch.x, samples
    )


def _subgraph_between(builder: PlanBuilder, first: fx.Node, last: fx.Node) -> fx.GraphModule | None:
    """Graph from the value of one node to that of another; None where values of tokens go into it beside that."""
    graph = fx.Graph()
    copies = {first: graph.placeholder("x")}

    def copied(node: fx.Node) -> Any:
        value = builder.values[node]
        if node not in copies and isinstance(value, Routed):
            operands: Any = (fx.map_arg(part, copied) for part in (node.args, node.kwargs))
            args, kwargs = operands
            copies[node] = graph.create_node(node.op, node.target, args, kwargs)
        return copies.get(node, value)

    try:
        graph.output(copied(last))
        return fx.GraphModule(builder.model, graph)
    except (*_ERRORS, AssertionError):
        return None


# -- the end of a region -------------------------------------------------------------------------------------


def _lower_if_expert_result(builder: PlanBuilder, value: Routed) -> Routed | Rows:
    """Rows of tokens that a value is: sums of experts by weights, or outputs of each expert of a token."""
    dispatch, first, tokens = value.dispatch, value.samples[0], builder.plan.layout.tokens
    if dispatch is None or not dispatch.samples or not isinstance(first, Tensor) or not first.is_floating_point():
        return value
    if first.shape[-1] != dispatch.experts.outputs:
        return value
    register = None
    flat = [sample.reshape(-1, first.shape[-1]) for sample in value.samples]
    if len(flat[0]) == tokens:
        register = _append_expert_sum(builder, value.router, dispatch, flat)
        if register is not None:
            dispatch.samples.clear()
    elif len(flat[0]) == len(dispatch.samples[0].rows):
        register = _append_expert_slots(builder, value.router, dispatch, flat)
    return value if register is None else Rows(builder.rows(register).view(first.shape))


def _append_expert_sum(builder: PlanBuilder, router: Router, dispatch: Dispatch, sums: list[Tensor]) -> int | None:
    """The register of rows that are sums of what experts make, whose outputs are weighed, or their inputs."""
    numbers, scales, weights = [], [], []
    for sample, value in zip(dispatch.samples, sums, strict=True):
        order = sample.row_numbers_by_token(len(value))
        if order is None or order.shape[1] > value.shape[1]:
            return None
        parts = sample.answers[sample.rows[order]]  # [tokens, count, out]
        if not bool(value.isfinite().all()):
            return None
        weight = torch.linalg.lstsq(parts.mT, value[..., None]).solution
        if not torch.allclose((parts * weight).sum(1), value, atol=_ATOL):
            return None
        is_chosen = (weight[..., 0] * sample.scales[order]).abs() > _ATOL
        if not is_chosen.any() or len(is_chosen.sum(1).unique()) > 1:
            return None
        numbers.append(sample.numbers[order][is_chosen].view(len(value), -1))
        scales.append(sample.scales[order][is_chosen].view(len(value), -1))
        weights.append(weight[..., 0][is_chosen].view(len(value), -1))
    node, experts, x = dispatch.node, dispatch.experts, dispatch.x
    if all(map(_are_ones, scales)):
        choice = expert_steps.infer_and_append_routing(builder, router, numbers, weights)
        return (
            None
            if choice is None
            else expert_steps.append_expert_outputs(builder, node, experts, choice, x, summed=True)
        )
    choice = (
        expert_steps.infer_and_append_routing(builder, router, numbers, scales)
        if all(map(_are_ones, weights))
        else None
    )
    return None if choice is None else expert_steps.append_outputs_of_weighted_input(builder, node, experts, choice, x)


def _append_expert_slots(builder: PlanBuilder, router: Router, dispatch: Dispatch, slots: list[Tensor]) -> int | None:
    """The register of rows that are what each expert of a token makes, side by side."""
    tokens, numbers = builder.plan.layout.tokens, []
    for sample, value in zip(dispatch.samples, slots, strict=True):
        row = (F.normalize(value) @ F.normalize(sample.answers).T).argmax(1)
        expected = torch.arange(tokens).repeat_interleave(len(value) // tokens)
        if not torch.equal(sample.answers[row], value) or not torch.equal(sample.tokens[row], expected):
            return None
        if not _are_ones(sample.scales):
            return None
        numbers.append(sample.numbers[row].view(tokens, -1))
    choice = expert_steps.infer_and_append_routing(builder, router, numbers, None)
    if choice is None:
        return None
    router.slots = numbers
    return expert_steps.append_expert_outputs(
        builder, dispatch.node, dispatch.experts, choice, dispatch.x, summed=False
    )


def _are_ones(x: Tensor) -> bool:
    return torch.allclose(x, torch.ones_like(x), atol=_ATOL)
