"""Exchanging weights layer by layer for others that keep the outputs over rows of data."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from ....dsl.checker.inputs import in_features_of
from ....dsl.checker.skeleton import Part, Skeleton, is_submodule
from ....dsl.checker.values import DataRef, Ratio
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning import shrink
from ...analysis.planning.cost import token_or_image_count
from ...core.shards import Shards
from ...ir.layers.linear import weight_of
from ...plugin.context import Context
from ...plugin.interfaces import Effort, param
from . import allocation
from .layerwise import Grams, Layerwise, Stage, stages
from .masks import keep_mask
from .sparsity import (
    Sparsifier,
    chosen_parts,
    finite_weight,
    note_zero_shares,
    relative_change,
    replace_weight,
    weight_count_by_path,
)

if TYPE_CHECKING:
    from ...ir.program import Program

# unit, weight [out, in], sums of x x^T or None where no row reached the module -> the weight that takes its place
SolveWeight = Callable[[str, Tensor, Tensor | None], Tensor]


class ReconstructingSparsifier(Sparsifier):
    """Zeros in linear modules whose other weights make up for them."""

    changes = ("weights", "values")

    sparsity: Ratio = param("Share of the weights that become zero.", of=("weights",), gt=0, lt=1)
    data: DataRef = param("Rows whose inputs of the modules count; more tokens than a module has inputs.")
    pattern: Literal["any", "2:4", "4:8"] = param(
        "Any weights, or two of every four or four of every eight inputs of an output.", default="any"
    )
    allocation: Literal["uniform", "owl", "searched"] = param(
        "How zeros spread over the layers: alike, by outliers, or by what they cost there.", default="uniform"
    )

    @abstractmethod
    def solve(self, weight: Tensor, gram: Tensor, sparsity: float) -> Tensor:
        """A weight of one module with its share of zeros, for inputs of these products."""

    def run(self, program: "Program", ctx: Context) -> None:
        """Make them, from the first layer to the last, and say what became zero.

        A module that no row reached keeps its largest weights as they are.
        """
        chosen, how, rows = self.chosen(skeleton_of(program)), self.allocation, ctx.rows(self.data)
        spread = allocation.allocate_sparsity_by_unit(
            program, stages(program, chosen), rows, self.sparsity.value, how, weight_count_by_path(chosen), ctx
        )

        def replacement(unit: str, weight: Tensor, gram: Tensor | None) -> Tensor:
            if gram is None:
                return torch.where(keep_mask(weight.abs().float(), spread[unit], "any", "row"), weight, 0.0)
            return self.solve(weight, gram, spread[unit])

        zeros, _ = solve_and_replace_weights(program, ctx, chosen, rows, replacement)
        note_zero_shares(program, chosen, zeros, allocation=how, tokens=rows.numel(), pattern=self.pattern)

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        return estimate_layerwise_effort(
            skeleton, chosen_parts(skeleton, self.on), ctx.rows(self.data), self.allocation
        )


class LayerwiseChanges(NamedTuple):
    zero_shares: dict[str, float]
    relative_changes: dict[str, float]


def solve_and_replace_weights(
    program: "Program", ctx: Context, selected_parts: Sequence[Part], rows: Tensor, solve_weight: SolveWeight
) -> LayerwiseChanges:
    """Exchange the weights of the chosen modules, each layer for what the exchanged ones before it give; their shares
    of zeros and relative changes by path. Finished layers are stored; a run that was killed continues after them."""
    parts, shards = stages(program, selected_parts), Shards(ctx.workdir / "layers")
    zero_shares, changes = {}, {}
    walk = Layerwise(program, rows)
    for stage in ctx.each(parts, "layers", len(parts)):
        weights = shards.get_or_compute_tensors(
            stage.unit, partial(_solved_weights_of_stage, program, walk, stage, solve_weight)
        )
        for path in stage.modules:
            before = weight_of(program.model.get_submodule(path))
            after = weights[path].to(before.device)
            changes[path] = relative_change(before, after)
            zero_shares[path] = replace_weight(program, path, after, ctx)
        walk.mark_changed(stage)
    return LayerwiseChanges(zero_shares, changes)


def _solved_weights_of_stage(
    program: "Program", layerwise: Layerwise, stage: Stage, solve_weight: SolveWeight
) -> dict[str, Tensor]:
    grams, weights = Grams(), {}
    layerwise.run_and_observe_inputs(stage, grams.accumulate)
    for path in stage.modules:
        weight = finite_weight(program, path)
        weights[path] = solve_weight(stage.unit, weight, grams.finite_gram_or_none(path)).to(weight.dtype)
    return weights


def estimate_layerwise_effort(
    skeleton: Skeleton, parts: Sequence[Part], rows: Tensor, allocation_method: str
) -> Effort:
    """Estimate the effort of a layerwise solver: every layer runs twice; solving costs about as much as so many tokens
    more. Held are a layer's sums."""
    flops, gram_bytes = 0, 0
    for part in parts:
        n, k = dict(part.tensors)["weight"]
        k = in_features_of(part)
        flops += 2 * k**3 + 2 * n * k * (k if n else 0)
    for unit in skeleton.units:
        gram_bytes = max(gram_bytes, sum(4 * in_features_of(p) ** 2 for p in parts if is_submodule(p.path, unit)))
    tokens = 2 * token_or_image_count(rows) + flops // max(1, shrink.flops_per_token(skeleton, 512))
    widest = max(map(in_features_of, parts), default=0)
    return Effort(
        tokens + allocation.allocation_token_count(allocation_method, len(skeleton.units), rows),
        gram_bytes + 24 * widest**2,
    )
