"""Scale what linear modules are given, so that rounding their weights loses less."""

from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.planning import shrink
from ...compiler.core.shards import Shards
from ...compiler.ir.program import Program
from ...compiler.ir.surgery import replace_tensor_everywhere
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Close, Effort, param
from ...compiler.transforms.search.folds import Fold, find_folds_by_unit
from ...compiler.transforms.search.layerwise import Layerwise, Stage, stages
from ...compiler.transforms.search.quantizing import GridPass
from ...compiler.transforms.search.scaling import N_TRIALS, InputStatistics, Scaling
from ...compiler.transforms.search.solving import estimate_layerwise_effort
from ...compiler.transforms.search.sparsity import finite_weight
from ...dsl.checker.inputs import in_features_of
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import DataRef


class Scale(GridPass):
    """Scale what linear modules are given, so that rounding their weights loses less.

    This is AWQ without its rounding, and SmoothQuant: run it before `quantize.round`, `quantize.gptq` or a target that
    rounds. Channels that are large over `data` become smaller where they are written, by a norm, the values of an
    attention or the factor of a gate, and their weights as much larger where they are read: the model computes what
    it did, bit for bit, as factors are powers of two. What may be scaled is found on the graph and tried; modules that
    read the same channels share a scale. Of twenty factors, by a channel's size alone and over that of its weights,
    the one is taken for which the outputs lose least on the grid of these `bits`, `group`, `zero` and `scales`, or
    none where all lose more.

    `inputs: int8` also counts what is lost where inputs are rounded token by token, as `native(weights: int8)` and the
    int8 kernels do: `bits: 8, group: 0, inputs: int8` is for those. `native(weights: int8, inputs: int16)` loses
    little of inputs: `bits: 8, group: 0` is for that.

    Source: AWQ (Lin et al. 2023, arXiv 2306.00978), section 3.2; SmoothQuant (Xiao et al. 2022, arXiv 2211.10438).
    Powers of two, values of grouped attention, and that the writer's own rounding counts, are own.
    Example: s = quantize.scale(on: "*_proj", data: calib, bits: 4, group: 32)
    """

    keeps = Close(atol=1e-3)
    changes = ("weights", "values")

    data: DataRef = param("Rows whose inputs of the modules count.")
    inputs: Literal["exact", "int8"] = param(
        "Whether modules are given numbers as they are, or rounded to int8 token by token.", default="exact"
    )

    def run(self, program: Program, ctx: Context) -> None:
        chosen, rows = self.chosen(skeleton_of(program)), ctx.rows(self.data)
        parts, folds_by_unit, shards = (
            stages(program, chosen),
            find_folds_by_unit(program),
            Shards(ctx.workdir / "layers"),
        )
        walk, changed = Layerwise(program, rows), []
        for stage in ctx.each(parts, "layers", len(parts)):
            tensors = shards.get_or_compute_tensors(
                stage.unit, partial(self._scale_stage_in_model, program, walk, stage, folds_by_unit.get(stage.unit, []))
            )
            for path, tensor in tensors.items():
                replace_tensor_everywhere(
                    program.model, path, ctx.map_from_cache(tensor.to(program.model.get_parameter(path).device))
                )
            walk.mark_changed(stage)
            changed += [fold.writer for fold in folds_by_unit.get(stage.unit, []) if f"{fold.writer}.weight" in tensors]
        program.changed()
        program.note(scaled=changed, folds=sum(map(len, folds_by_unit.values())), tokens=rows.numel())

    def _scale_stage_in_model(
        self, program: Program, layerwise: Layerwise, stage: Stage, folds_of_unit: list[Fold]
    ) -> dict[str, Tensor]:
        model, sums, tensors = program.model, InputStatistics(), {}
        for path in stage.modules:
            finite_weight(program, path)
        layerwise.run_and_observe_inputs(stage, sums.accumulate)
        scaling = Scaling.of(model, self.grid, sums, stage.modules, self.inputs == "int8")
        for fold in folds_of_unit:
            by = scaling.best_factors_or_none(fold)
            if by is None:
                continue
            scaling.multiply_in_factors(fold, by)
            for path, tensor in fold.scaled_tensors_by_path(model, by).items():
                tensors[path] = tensor
                replace_tensor_everywhere(model, path, tensor)
        return tensors

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Unchanged shapes. Groups that don't divide are reported here, before any weight is read."""
        self.chosen(skeleton)
        return skeleton

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        """Every weight is rounded for each factor of two folds, as reader and as writer, and its error summed."""
        chosen = self.chosen(skeleton)
        shapes = [(dict(part.tensors)["weight"][0], in_features_of(part)) for part in chosen]
        trials = 2 * 2 * N_TRIALS  # folds, kinds of factors, exponents
        flops = sum(trials * 2 * n * k * k for n, k in shapes)
        effort = estimate_layerwise_effort(skeleton, chosen, ctx.rows(self.data), "uniform")
        numbers = sum(n * k for n, k in shapes)
        tokens = effort.tokens + flops // max(1, shrink.flops_per_token(skeleton, 512))
        return replace(effort, tokens=tokens, work={"select": trials * numbers, "grid": 4 * numbers * self.grid.search})
