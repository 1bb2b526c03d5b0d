"""Experts before whom tokens stand in line: a router sorts them, one expert after another takes those in its part.

Rows of such a line are followed in the order of tokens and, for each, of the experts that it was given to; a sum over
the places of a line, or over its tokens, ends it. So a layer of experts is a step of the chosen ones, whatever lies
between two of them, attention among it.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import calls, routers
from .values import Layer, Line, Queued, Rows

if TYPE_CHECKING:
    from .reader import Reader

_WHY = "tokens in line before experts are met otherwise than by layers of these and functions of each"
_SPLITS = frozenset({"chunk", "split", "tensor_split"})
_EVERY = slice(None)


class Queues:
    """The part of a `Reader` that follows such lines."""

    def __init__(self, reader: "Reader"):
        self.reader = reader

    def begin(self, node: fx.Node, module: nn.Module, args: Any, kwargs: Any) -> tuple[Line, ...] | None:
        """What a router of rows [n, width] returns, where it sorts them; else None."""
        given = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(given, Rows) or given.index.dim() != 2:
            return None
        found = recognise(module, given.index.shape[1])
        if found is None:
            return None
        choice = self.reader.mixtures.chosen(node, module, given, {}, found[0])
        return tuple(Line(choice, part) for part in found[1])

    def meet(self, node: fx.Node, role: str | None, args: Any, kwargs: Any) -> Any:
        name, first = calls.operation(node), args[0]
        if isinstance(first, tuple | list) and name == "getitem":
            return first[args[1]]
        if name in calls.ASKS:
            shape = node.args[0].meta["shape"]
            return self.reader.size_of(node, torch.zeros(()).expand(shape), args[1:])
        if name == "getitem" and isinstance(first, Rows) and isinstance(args[1], Line):
            return self._in_line(node, first, args[1])
        if name == "getitem" and isinstance(first, Line) and args[1] == (_EVERY, None):
            return first
        if role == "experts" and len(args) == 2 and isinstance(first, Queued) and not kwargs:
            return self._layer(node, self.reader.model.get_submodule(str(node.target)), first, args[1])
        if name in ("mul", "multiply") and any(isinstance(x, Line) for x in args):
            return self._weighed(node, *args)
        if name == "index_add":
            return self._ends(node, *args)
        return self._each(node, role, args, kwargs)

    def _in_line(self, node: fx.Node, x: Rows, line: Line) -> Queued:
        """Tokens [n, width], each once for every expert that it is given to; or what they already have for each."""
        tokens, choice = self.reader.plan.layout.tokens, line.choice
        whole = {"tokens": tokens, "places": tokens * choice.count}
        if x.index.dim() != 2 or whole.get(line.part) != len(x.index):
            raise self.reader.refuse(node, _WHY)
        index = x.index.repeat_interleave(choice.count, 0) if line.part == "tokens" else x.index
        return Queued(choice, Rows(index, x.pending))

    def _layer(self, node: fx.Node, module: nn.Module, given: Queued, sizes: Any) -> Queued:
        found = layer(module, given.choice.experts) if isinstance(sizes, Line) and sizes.part == "sizes" else None
        if found is None or sizes.choice != given.choice:
            why = f"a {type(module).__name__} computes something else than one layer for each expert"
            raise self.reader.refuse(node, why)
        rows, count = self.reader.settled(self._rows(node, given)).index, given.choice.count
        own = rows.view(-1, count, rows.shape[1])
        alike = torch.equal(own, own[:, :1].expand_as(own))  # every expert takes the token itself
        x = Rows(own[:, 0] if alike else own.flatten(1))
        return Queued(given.choice, None, Layer(str(node.target), found, x))

    def _weighed(self, node: fx.Node, a: Any, b: Any) -> Queued:
        queued, line = (a, b) if isinstance(a, Queued) else (b, a)
        fits = isinstance(queued, Queued) and isinstance(line, Line) and line.part == "weights"
        if not fits or queued.choice != line.choice or queued.layer is None or queued.weighed:
            raise self.reader.refuse(node, _WHY)
        return replace(queued, weighed=True)

    def _ends(self, node: fx.Node, onto: Any, axis: Any, line: Any, queued: Any) -> Rows:
        """Rows of a line at their tokens, summed, or at their places."""
        plain = isinstance(onto, Tensor) and axis == 0 and isinstance(line, Line) and isinstance(queued, Queued)
        if not plain or line.choice != queued.choice or bool(onto.any()):
            raise self.reader.refuse(node, _WHY)
        if line.part == "places" and not queued.weighed:
            made = self._rows(node, queued)
        elif line.part == "tokens" and queued.weighed:
            made = Rows(self.reader.plan.layout.rows(self._step(queued, summed=True)))
        else:
            raise self.reader.refuse(node, _WHY)
        assert made.index.shape == onto.shape, f"{tuple(made.index.shape)} rows on {tuple(onto.shape)}"
        return made

    def _each(self, node: fx.Node, role: str | None, args: Any, kwargs: Any) -> Any:
        """What a function of each row makes of a line."""
        queued = [x for x in args if isinstance(x, Queued)]
        name = calls.operation(node)
        known = name in calls.UNARY or name in calls.BINARY or name in calls.SAME or role == "activation"
        if name in _SPLITS:
            known = (kwargs.get("dim", args[2] if len(args) > 2 else 0)) in (-1, 1)
        plain = not any(isinstance(x, Line | Rows) for x in (*args, *kwargs.values()))
        if not known or not plain or not queued or any(x.choice != queued[0].choice for x in queued):
            raise self.reader.refuse(node, _WHY)
        given = [self._rows(node, x) if isinstance(x, Queued) else x for x in args]
        if node.op == "call_module":
            made: Any = self.reader.activated(node, given[0])
        else:
            made = self.reader.computing.computed(node, given, kwargs)
        if isinstance(made, tuple):
            return tuple(Queued(queued[0].choice, part) for part in made)
        return Queued(queued[0].choice, made)

    def _rows(self, node: fx.Node, queued: Queued) -> Rows:
        """[tokens * count, width]."""
        if queued.weighed:
            raise self.reader.refuse(node, _WHY)
        if queued.rows is not None:
            return queued.rows
        made = self.reader.plan.layout.rows(self._step(queued, summed=False))
        return Rows(made.view(len(made) * queued.choice.count, -1))

    def _step(self, queued: Queued, *, summed: bool) -> int:
        own = queued.layer
        assert own is not None, "a line without rows is that of a layer"
        return self.reader.mixtures.layer(
            own.name, queued.choice, self.reader.register(own.x)[0], own.weights, summed=summed
        )


@torch.no_grad()
def recognise(module: nn.Module, width: int) -> tuple[routers.Routing, list[str]] | None:
    """The rule of a router that sorts rows by their experts, and what each part is of what it returns; or None.

    "places" are numbers of rows times experts of each, sorted by expert; "tokens" the rows of those, "weights" theirs,
    "sizes" how many each expert takes. Of anything else nothing is known ("").
    """
    tried = routers.answers(module, width, {}, 2, 1.0)
    if tried is None:
        return None
    tensors, x, parts = tried
    flat = [p for p in parts if isinstance(p, Tensor) and p.dim() == 1 and len(p) and len(p) % len(x) == 0]
    places = next((p for p in flat if not p.is_floating_point() and p.unique().numel() == len(p)), None)
    if places is None or not torch.equal(places.sort().values, torch.arange(len(places))):
        return None
    count, sizes = len(places) // len(x), next((p for p in parts if isinstance(p, list)), None)
    weights = next((p for p in flat if p.is_floating_point() and len(p) == len(places)), None)
    if sizes is None or weights is None or not all(type(n) is int for n in sizes) or sum(sizes) != len(places):
        return None
    numbers, own = torch.empty_like(places), torch.empty_like(weights)
    numbers[places], own[places] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), weights
    sample = routers.Sample(tensors, x, own.view(-1, count).float(), numbers.view(-1, count), (0, 0))
    rule = routers.ruled(module, width, sample)
    tokens = places // count

    def part(value: Any) -> str:
        if isinstance(value, Tensor) and value.shape == places.shape and not value.is_floating_point():
            return "places" if torch.equal(value, places) else "tokens" if torch.equal(value, tokens) else ""
        return "weights" if value is weights else "sizes" if value is sizes else ""

    return None if rule is None else (rule, [part(value) for value in parts])


@torch.no_grad()
def layer(module: nn.Module, experts: int) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """Weights and biases of a module (rows, how many each expert takes) that is a linear layer for each; or None."""
    held = [p.detach() for p in module.parameters()]
    for solid in (p for p in held if p.dim() == 3 and len(p) == experts):
        for weight in (solid, solid.mT):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn((2, weight.shape[2]), generator=generator).to(weight.dtype)
            sizes = [0] * experts
            sizes[0] += 1
            sizes[-1] += 1
            for bias in (None, *(p for p in held if p.shape == weight.shape[:2])):
                own = [
                    F.linear(x[i : i + 1], weight[e], None if bias is None else bias[e]) for i, e in enumerate((0, -1))
                ]
                try:
                    wanted = module(x, sizes)
                except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # made for something else
                    continue
                close = isinstance(wanted, Tensor) and wanted.shape == (2, weight.shape[1])
                if close and torch.allclose(wanted.float(), torch.cat(own).float(), rtol=1e-3, atol=1e-3):
                    return (weight,), bias
    return None
