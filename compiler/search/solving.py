"""Exchanging weights layer by layer for others that keep the outputs over rows of data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...dsl.inputs import inputs
from ...dsl.skeleton import Part, Skeleton
from ...dsl.values import Ratio, Selector
from ..ir.edits import is_below
from ..planning import shrink
from ..store.shards import Shards
from ..words.context import Context
from ..words.kinds import Effort
from . import allocation
from .layerwise import Grams, Layerwise, Stage, stages
from .masks import keep_mask
from .sparsity import check_pattern, chosen_parts, exchange, finite_weight, note, sizes

if TYPE_CHECKING:
    from ..ir.program import Program

# unit, weight [out, in], sums of x x^T or None where no row reached the module -> the weight that takes its place
New = Callable[[str, Tensor, Tensor | None], Tensor]
Solve = Callable[[Tensor, Tensor, float], Tensor]  # weight, sums, share of zeros -> weight


@dataclass(frozen=True)
class Zeros:
    """The zeros that a recipe asks of linear modules whose other weights make up for them.

    allocation   the shares of the layers: "uniform", "owl" or "searched"
    """

    on: Selector | None
    sparsity: Ratio
    pattern: str
    allocation: str

    def chosen(self, skeleton: Skeleton) -> tuple[Part, ...]:
        """Raises Reject where the pattern fits a module or the share not."""
        chosen = chosen_parts(skeleton, self.on)
        check_pattern(chosen, self.pattern, self.sparsity, self.allocation)
        return chosen

    def make(self, program: "Program", ctx: Context, rows: Tensor, new: Solve) -> None:
        """Make them, from the first layer to the last, and say what became zero.

        A module that no row reached keeps its largest weights as they are.
        """
        chosen, how = self.chosen(program.skeleton), self.allocation
        spread = allocation.shares(program, stages(program, chosen), rows, self.sparsity.value, how, sizes(chosen), ctx)

        def solve(unit: str, weight: Tensor, gram: Tensor | None) -> Tensor:
            if gram is None:
                return torch.where(keep_mask(weight.abs().float(), spread[unit], "any", "row"), weight, 0.0)
            return new(weight, gram, spread[unit])

        zeros = exchanged(program, ctx, chosen, rows, solve)
        note(program, chosen, zeros, allocation=how, tokens=rows.numel(), pattern=self.pattern)

    def effort(self, skeleton: Skeleton, rows: Tensor) -> Effort:
        return effort(skeleton, chosen_parts(skeleton, self.on), rows, self.allocation)


def exchanged(program: "Program", ctx: Context, chosen: Sequence[Part], rows: Tensor, new: New) -> dict[str, float]:
    """Exchange the weights of the chosen modules, each layer for what the exchanged ones before it give; their
    shares of zeros by path. What is done is kept layer by layer, and a run that was killed goes on there."""
    parts, found, shards = stages(program, chosen), {}, Shards(ctx.workdir / "layers")
    walk = Layerwise(program, rows)
    for stage in ctx.each(parts, "layers", len(parts)):
        made = shards.remember(stage.unit, partial(_solve_stage, program, walk, stage, new))
        for path in stage.modules:
            found[path] = exchange(program, path, made[path].to(program.model.get_submodule(path).weight.device))
        walk.leave(stage)
    return found


def _solve_stage(program: "Program", walk: Layerwise, stage: Stage, new: New) -> dict[str, Tensor]:
    grams, made = Grams(), {}
    walk.look(stage, grams.listen)
    for path in stage.modules:
        weight = finite_weight(program, path)
        made[path] = new(stage.unit, weight, grams.of(path)).to(weight.dtype)
    return made


def effort(skeleton: Skeleton, chosen: Sequence[Part], rows: Tensor, how: str) -> Effort:
    """Every layer runs twice; solving costs about as much as so many tokens more. Held are a layer's sums."""
    flops, held = 0, 0
    for part in chosen:
        n, k = dict(part.tensors)["weight"]
        k = inputs(part)
        flops += 2 * k**3 + 2 * n * k * (k if n else 0)
    for unit in skeleton.units:
        held = max(held, sum(4 * inputs(p) ** 2 for p in chosen if is_below(p.path, unit)))
    tokens = 2 * rows.numel() + flops // max(1, shrink.flops_per_token(skeleton, 512))
    widest = max(inputs(part) for part in chosen)
    return Effort(tokens + allocation.effort(how, len(skeleton.units), rows), held + 24 * widest**2)
