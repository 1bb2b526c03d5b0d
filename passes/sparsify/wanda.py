"""Make those weights of linear modules zero that matter least for what the modules are given."""

from functools import partial
from typing import Literal

from torch import Tensor

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.planning.cost import token_or_image_count
from ...compiler.analysis.planning.peak_memory import estimate_batch_bytes
from ...compiler.core.journal import Journal
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, param
from ...compiler.transforms.search.allocation import allocate_sparsity_by_unit, allocation_token_count
from ...compiler.transforms.search.layerwise import Layerwise, Norms, Stage, stages
from ...compiler.transforms.search.masks import keep_mask
from ...compiler.transforms.search.sparsity import (
    Sparsifier,
    chosen_parts,
    mask_weight,
    mask_work,
    note_zero_shares,
    weight_count_by_path,
    weight_score,
)
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import DataRef

MAX_SHARDS = 7  # bytes of a weight of the largest module: a float32 score, a mask, the result


class Wanda(Sparsifier):
    """Make those weights of linear modules zero that matter least for what the modules are given.

    A weight matters as much as its magnitude times the norm of its input over `data`, and every output
    loses the same share. Layers are masked from the first to the last, each for what the masked ones before
    it give; a killed run goes on at the layer where it was. Nothing is trained, and nothing gets smaller or
    faster by itself: `lower.sparse_cpu` packs what is left, `tune.heal` trains it and keeps the zeros.

    `allocation: owl` leaves more in layers with more outlying weights, `allocation: searched` where zeros in
    one layer alone move the model's predictions more; the share over all layers stays what was asked.

    Source: Wanda (Sun et al. 2023, arXiv 2306.11695), section 3; its `blocks` are own, a block's score the
    mean square of its weights' scores.
    Example: sps = sparsify.wanda(on: "*_proj", sparsity: 50% of weights, data: calib)
    """

    data: DataRef = param("Rows whose inputs of the modules count; some thousand tokens.")
    allocation: Literal["uniform", "owl", "searched"] = param(
        "How zeros spread over the layers: alike, by outliers, or by what they cost there.", default="uniform"
    )

    def run(self, program: Program, ctx: Context) -> None:
        chosen, masks, rows = self.chosen(skeleton_of(program)), {}, ctx.rows(self.data)
        parts, journal = stages(program, chosen), Journal(ctx.workdir / "norms.jsonl")
        spread = allocate_sparsity_by_unit(
            program, parts, rows, self.sparsity.value, self.allocation, weight_count_by_path(chosen), ctx
        )
        walk = Layerwise(program, rows)
        for stage in ctx.each(parts, "masks", len(parts)):
            norms = journal.get_or_compute(stage.unit, partial(_input_norms_of_stage, walk, stage))
            for path in stage.modules:
                score = weight_score(program, path, norms[path])
                keep = keep_mask(score, spread[stage.unit], self.pattern, "row")
                masks[path] = mask_weight(program, path, keep, ctx)
            walk.mark_changed(stage)
        note_zero_shares(program, chosen, masks, pattern=self.pattern, allocation=self.allocation, tokens=rows.numel())

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        """Estimate the effort: every layer runs twice, once for the look at it, once masked."""
        rows: Tensor = ctx.rows(self.data)
        chosen = chosen_parts(skeleton, self.on)
        tokens = 2 * token_or_image_count(rows) + allocation_token_count(self.allocation, len(skeleton.units), rows)
        buffer_bytes = MAX_SHARDS * max(weight_count_by_path(chosen).values(), default=0) + estimate_batch_bytes(
            skeleton, rows
        )
        return Effort(tokens, n_separate=buffer_bytes, work=mask_work(chosen, self.pattern, "row"))


def _input_norms_of_stage(layerwise: Layerwise, stage: Stage) -> dict[str, list[float]]:
    norms = Norms()
    layerwise.run_and_observe_inputs(stage, norms.accumulate)
    return {path: norms.input_norms_or_empty(path) for path in stage.modules}
