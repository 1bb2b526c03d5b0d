"""Mixtures of experts: a router's choice, and what the experts that it chose make of a token.

The experts of a layer are one module, with the weights of all in tensors of three axes. What lies between the two
layers of an expert is read as the rest of the graph is; how the tensors meet is found by trying.
"""

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, permutations, product
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ir.layers import leaves
from . import linears, reductions, routers
from .layout import IrregularColumns
from .plan import Entry
from .plan_builder import PlanBuilder
from .rule import Call
from .values import ElementwiseExpr, ExpertChoice, Rows

Layer = tuple[tuple[Tensor, ...], Tensor | None]  # weights, one after another, and a bias
_ATOL = 1e-4  # of outputs of size one, in float32


@dataclass(frozen=True)
class Experts:
    """y = down(middle(up(x))) of each expert.

    up           [experts, out, in] each, one after another
    down         [experts, out, in]
    middle       the graph between them, of the numbers that `up` makes
    idle         so many more that a router may choose give back what they are given
    """

    up: tuple[Tensor, ...]
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    middle: fx.GraphModule
    idle: int = 0

    def __call__(self, x: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        up_bias, down_bias = (0 if b is None else b[numbers] for b in (self.up_bias, self.down_bias))
        inner = self.middle(torch.einsum("ti,tkoi->tko", x, torch.cat(self.up, 1)[numbers]) + up_bias)
        return ((torch.einsum("tki,tkoi->tko", inner, self.down[numbers]) + down_bias) * weights[..., None]).sum(1)


def lower_router(builder: PlanBuilder, call: Call) -> Any:
    """Result of a router, as far as experts read it."""
    node, module, x, args = call.node, call.module, call.first, call.args[1:]
    if module is None or call.kwargs:
        return NotImplemented
    tensors = {f"given.{i}": value for i, value in enumerate(args) if isinstance(value, Tensor)}
    shape, all_tensors = tuple(x.index.shape), len(tensors) == len([a for a in args if a is not None])
    recognised = routers.recognise_router(module, shape, tensors) if all_tensors else None
    if recognised is None:
        return NotImplemented
    choice, order = lower_choice(builder, node, module, x, tensors, recognised[0]), recognised[1]
    parts = {order[0]: "weights", order[1]: "numbers"}
    return tuple(replace(choice, part=parts.get(i, "")) for i in range(max(order) + 1))


def parts(
    builder: PlanBuilder, node: fx.Node, module: nn.Module, x: Rows, rule: routers.Routing, names: list[str]
) -> list[ExpertChoice]:
    """A choice by a rule, once for each of what is named of it."""
    choice = lower_choice(builder, node, module, x, {}, rule)
    return [replace(choice, part=name) for name in names]


def lower_choice(
    builder: PlanBuilder,
    node: fx.Node,
    module: nn.Module,
    x: Rows,
    extra_tensors: dict[str, Tensor],
    rule: routers.Routing,
) -> ExpertChoice:
    plan, tensors = (builder.plan, dict((*module.named_parameters(), *module.named_buffers(), *extra_tensors.items())))
    vectors = {
        name: None
        if key is None
        else plan.vector_entry(f"{node.target}.{key}", tensors[key] if name == "weight" else tensors[key].flatten())
        for name, key in (("weight", rule.weight), ("bias", rule.bias), ("shift", rule.shift))
    }
    experts = len(tensors[rule.weight])
    scores = plan.append_step("scores", experts, x=_rows(builder, x), weight=vectors["weight"], bias=vectors["bias"])
    register = plan.append_step(
        "route",
        2 * rule.count,
        x=scores,
        kind=rule.kind,
        bias=vectors["shift"],
        count=rule.count,
        groups=rule.groups,
        kept=rule.n_groups_chosen,
        judges=rule.judges,
        normal=rule.normal,
        eps=rule.eps,
        scale=rule.scale,
    )
    return ExpertChoice(register, rule.count, experts, "")


def lower_experts(builder: PlanBuilder, call: Call) -> Rows:
    node, module, operands = call.node, call.module, [*call.args, *call.kwargs.values()]
    assert module is not None, f"{node.name} calls no module"
    rows = [value for value in operands if isinstance(value, Rows)]
    parts = {value.part: value for value in operands if isinstance(value, ExpertChoice)}
    if len(rows) != 1 or len(operands) != 3 or parts.keys() != {"weights", "numbers"}:
        raise builder.rejection(node, "experts of another form than rows, the numbers of experts and their weights")
    choice, x = parts["numbers"], rows[0]
    order = ["x" if isinstance(value, Rows) else value.part for value in operands]
    form = recognise_experts(module, x.index.shape[-1], choice.experts, order, list(call.kwargs))
    if form is None or choice.register != parts["weights"].register:
        reason = f"a {type(module).__name__} computes something else than two layers for each expert"
        raise builder.rejection(node, reason)
    output = Rows(
        builder.rows(expert_outputs_register(builder, node, form, choice, x, summed=True)).view(x.index.shape)
    )
    return _add_identity_experts(builder, node, choice, len(form.down), x, output) if form.idle else output


def _add_identity_experts(
    builder: PlanBuilder, node: fx.Node, choice: ExpertChoice, real: int, x: Rows, output: Rows
) -> Rows:
    """Outputs of experts on x, plus x times the weights of identity experts."""
    parts = builder.rows(choice.register)
    weights, numbers = parts[:, : choice.count], parts[:, choice.count :]
    above = builder.materialised(Rows(numbers, ElementwiseExpr(operator.sub, (None, float(real - 1)))))
    idle = builder.materialised(
        Rows(above.index, ElementwiseExpr(torch.clamp, (None, 0.0, 1.0)))
    )  # one of those, else zero
    shares = builder.materialised(builder.product(idle, Rows(weights)))
    share = reductions.total(builder, [Rows(shares.index[:, i : i + 1]) for i in range(choice.count)])
    spread = builder.materialised(share).index.view(*x.index.shape[:-1], 1)
    return builder.elementwise_of_two("add", output, builder.product(x, Rows(spread)))


def expert_outputs_register(
    builder: PlanBuilder, node: fx.Node, form: Experts, choice: ExpertChoice, x: Rows, *, summed: bool
) -> int:
    """The register of what the chosen experts make of x, or of an x for each of them."""
    plan, name = builder.plan, str(node.target)
    up = expert_layer_register(builder, name + ".up", choice, _rows(builder, x), (form.up, form.up_bias), summed=False)
    tokens = plan.layout.tokens
    inner = _lower_middle(builder, node, form.middle, name, Rows(plan.layout.rows(up).view(tokens, choice.count, -1)))
    return expert_layer_register(
        builder, name + ".down", choice, _rows(builder, inner), ((form.down,), form.down_bias), summed=summed
    )


def _rows(builder: PlanBuilder, value: Rows) -> int:
    """The register of a value that has its tokens in order."""
    register, lane = builder.register(value)
    if not torch.equal(lane.order, torch.arange(len(lane.order))):
        raise IrregularColumns
    return register


def expert_layer_register(
    builder: PlanBuilder, name: str, choice: ExpertChoice, x: int, layer: Layer, *, summed: bool
) -> int:
    plan, numbers, (weights, bias) = builder.plan, builder.numbers, layer
    names, zero_weights = [], tuple(torch.zeros_like(w[0]) for w in weights)  # of experts that are not there
    for expert in range(choice.experts):
        expert_weights = tuple(w[expert] for w in weights if expert < len(w))
        linear = linears.Stacked(expert_weights or zero_weights)
        entry = Entry("packed", linear.shape, linear.make(numbers.weights, numbers.group))
        names.append(plan.add_entry(f"{name}.{expert}.weight", entry, linear.key))
    width = linear.shape[0] * (1 if summed else choice.count)
    biases = None if bias is None else plan.vector_entry(f"{name}.biases", bias)
    return plan.append_step("experts", width, x=x, chosen=choice.register, weights=names, biases=biases, summed=summed)


def _lower_middle(builder: PlanBuilder, node: fx.Node, middle: fx.GraphModule, path: str, up: Rows) -> Rows:
    """Lower the operations between the layers of an expert, step by step."""
    values: dict[fx.Node, Any] = {}
    for inner in middle.graph.nodes:
        if inner.op == "placeholder":
            values[inner] = up
            continue
        args, kwargs = fx.map_arg((inner.args, inner.kwargs), values.__getitem__)
        if inner.op == "output":
            return args[0]
        if inner.op == "get_attr":
            values[inner] = getattr(middle, inner.target)
        elif inner.op == "call_module":
            x = args[0]
            values[inner] = Rows(x.index, ElementwiseExpr(middle.get_submodule(inner.target), (x.pending,)))
        else:
            inner.meta = node.meta | inner.meta
            values[inner] = builder.lower(Call(inner, args, kwargs))
    raise AssertionError(f"the middle of {path} has no output")


@torch.no_grad()
def recognise_experts(
    module: nn.Module, width: int, experts: int, order: list[str], names: list[str]
) -> Experts | None:
    """Experts that a module computes on rows of `width` numbers, or None.

    order   of a call's arguments, "x", "numbers" and "weights", the last of them by `names`
    """
    real = min((len(p) for p in module.parameters() if p.dim() == 3), default=experts)
    if any(p.dim() == 3 and len(p) not in (real, experts) for p in module.parameters()):
        return None  # its router knows of others
    light, picked, idle = _few_experts(module, experts, real)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((3, width), generator=generator)
    weights = torch.rand((3, 1 + len(picked)), generator=generator)

    def answer(numbers: Tensor) -> Tensor | None:
        sample = {"x": x, "numbers": numbers, "weights": weights[:, : numbers.shape[1]]}
        values = [sample[name] for name in order]
        first = len(values) - len(names)
        try:
            return light(*values[:first], **dict(zip(names, values[first:], strict=True))).float().view(3, -1)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else
            return None

    numbers = torch.arange(len(picked)).repeat(3, 1)
    expected, with_idle = answer(numbers), answer(torch.tensor([[0, len(picked)]] * 3)) if idle else None
    if expected is None:
        return None
    for number, form in enumerate(_candidate_forms(light, width, len(picked) + idle)):
        if not _close(form, x, numbers, weights[:, : len(picked)], expected):
            continue
        full_form = next(islice(_candidate_forms(module, width, experts), number, None))
        if not idle:
            return full_form
        back = with_idle is not None and _close(
            form, x, numbers[:, :1], weights[:, :1], with_idle - x * weights[:, 1:2]
        )
        return replace(full_form, idle=experts - real) if back else None
    return None


def _close(form: Experts, x: Tensor, numbers: Tensor, weights: Tensor, expected: Tensor) -> bool:
    try:
        actual = form(x, numbers, weights)
    except RuntimeError:  # shapes that do not meet
        return False
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=_ATOL, atol=_ATOL)


@torch.no_grad()
def recognise_sorted_experts(module: nn.Module, width: int, experts: int) -> Experts | None:
    """Experts that a module computes on rows ordered by expert, zeros for zeros; or None."""
    if any(p.dim() == 3 and len(p) != experts for p in module.parameters()):
        return None
    light, picked, _ = _few_experts(module, experts, experts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((len(picked), 3, width), generator=generator)
    try:
        expected = light(x.flatten(0, 1)).float()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else
        return None
    for number, form in enumerate(_candidate_forms(light, width, len(picked))):
        try:
            actual = [form(rows, torch.full((3, 1), i), torch.ones(3, 1)) for i, rows in enumerate(x)]
            of_zeros = form(torch.zeros(1, width), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        except RuntimeError:  # shapes that do not meet
            continue
        same_shape = expected.shape == (3 * len(picked), width) and not of_zeros.any()
        if same_shape and torch.allclose(torch.cat(actual), expected, rtol=_ATOL, atol=_ATOL):
            return next(islice(_candidate_forms(module, width, experts), number, None))
    return None


def _few_experts(module: nn.Module, experts: int, real: int) -> tuple[nn.Module, Tensor, int]:
    """Experts of which a few are there, in float32, without a copy of the others; which; and how many idle ones."""
    picked, idle = torch.tensor([0, real - 1][:real]), min(experts - real, len([0, 1][:real]))
    idle = min(idle, 1) if experts != 2 * real else idle  # numbers of as many mean the same
    with_idle = torch.cat([picked, torch.arange(real, real + idle)])
    index_by_count = {experts: with_idle, real: picked}

    def fewer(p: Tensor) -> nn.Parameter:
        if p.dim() == 2 and len(p) not in index_by_count and len(p) % experts == 0:  # one expert after another
            return nn.Parameter(p.view(experts, -1, p.shape[1])[with_idle].flatten(0, 1).float(), requires_grad=False)
        return nn.Parameter((p[index_by_count[len(p)]] if len(p) in index_by_count else p).float(), requires_grad=False)

    light = copy.deepcopy(module, {id(p): fewer(p.detach()) for p in module.parameters()})
    sizes = {experts - real: idle, real: len(picked), experts: len(with_idle)}
    for part in light.modules():
        for name, value in [*vars(part).items()]:
            if type(value) is int and value in sizes and "expert" in name:
                setattr(part, name, sizes[value])
    return light, picked, idle


def _candidate_forms(module: nn.Module, width: int, experts: int) -> Iterator[Experts]:
    """Ways in which tensors of three axes may meet, in an order that does not depend on how many experts there are."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    solid = [p for p in parameters.values() if p.dim() == 3]
    if not solid:  # one expert after another
        rows = [p for p in parameters.values() if p.dim() == 2 and p.shape[1] == width and len(p) % experts == 0]
        solid = [p.view(experts, -1, width) for p in rows]
    flat = [None, *(p for p in parameters.values() if p.dim() == 2)]
    for *first, last in permutations(solid):
        for turned, back in product((False, True), repeat=2):
            up, down = tuple(w.mT if turned else w for w in first), last.mT if back else last
            if not up or any(w.shape[2] != width for w in up) or down.shape[1] != width:
                continue
            up_width = sum(w.shape[1] for w in up)
            for up_bias, down_bias in product(flat, repeat=2):
                if _fits(up_bias, up_width) and _fits(down_bias, width):
                    for middle in _middle_graphs(module):
                        yield Experts(up, up_bias, down, down_bias, middle)


def _fits(bias: Tensor | None, width: int) -> bool:
    return bias is None or bias.shape[1] == width


class _ModuleFunction(nn.Module):
    """Function that a module runs between its layers, where it has one."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        gate: Any = self.module._apply_gate  # a method of classes that have it
        return gate(x)


class _Gated(nn.Module):
    """The first half by an activation, times the second."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return self.act(first) * second


class _NoGate(_Gated):
    """No gate."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return True


def _middle_graphs(module: nn.Module) -> Iterator[fx.GraphModule]:
    acts = [part for part in module.modules() if leaves.module_role(part) == "activation"]
    for root in (
        *([_ModuleFunction(module)] if hasattr(module, "_apply_gate") else ()),
        *map(_Gated, acts),
        *map(_NoGate, acts),
    ):
        try:
            yield fx.GraphModule(root, _Tracer().trace(root))
        except (fx.proxy.TraceError, TypeError, AttributeError):  # it asks for numbers
            continue
