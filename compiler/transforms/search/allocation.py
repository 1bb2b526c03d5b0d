"""Allocation of zeros to layers, for a total share."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...analysis.planning.cost import token_or_image_count
from ...core.journal import Journal
from ...ir.surgery import tensor_at
from ...models.rows.forward import evaluating, has_logits, main_tensor_of_output, memory_batches
from ...models.rows.inputs import forward_args_and_kwargs
from ...plugin.context import Context
from .layerwise import Layerwise, Norms, Stage
from .masks import keep_mask
from .prefix import Prefix
from .sparsity import weight_score

if TYPE_CHECKING:
    from ...ir.program import Program

OUTLIER, SPREAD = 5.0, 0.08  # OWL's M and lambda, as published for Llama
STEP, REACH = 0.1, 0.2  # how far from the mean share is probed, and how far a layer may end
TOKENS = 512  # that a probe reads, at most; and at least one row
CACHE_BYTES = 512 << 20  # bytes of kept layer outputs


def allocate_sparsity_by_unit(
    program: "Program",
    stages: Sequence[Stage],
    rows: Tensor,
    mean_sparsity: float,
    method: str,
    weight_count_by_module: Mapping[str, int],
    ctx: Context,
) -> dict[str, float]:
    """The share of zeros of each stage by its unit; those outside of all units take `mean_sparsity`.

    weight_count_by_module  weights of each module
    Stages weighed by their weights, the mean is `mean_sparsity`.
    """
    inside = [s for s in stages if s.unit]
    if method == "uniform" or not inside:
        return {s.unit: mean_sparsity for s in stages}
    weights = {s.unit: sum(weight_count_by_module[path] for path in s.modules) for s in inside}
    journal = Journal(ctx.workdir / "allocation.jsonl")
    norms = journal.get_or_compute("norms", lambda: _input_norms_by_module(program, inside, rows))
    if method == "owl":
        ratios = {s.unit: journal.get_or_compute(s.unit, partial(_outlier_ratio, program, s, norms)) for s in inside}
        spread = owl_sparsities(ratios, weights, mean_sparsity)
    else:
        spread = equal_marginal_cost_sparsities(
            _probe_sparsity_costs(program, inside, rows, mean_sparsity, norms, journal, ctx), weights, mean_sparsity
        )
    return {s.unit: spread.get(s.unit, mean_sparsity) for s in stages}


def _input_norms_by_module(program: "Program", stages: Sequence[Stage], rows: Tensor) -> dict[str, list[float]]:
    paths, norms = [path for stage in stages for path in stage.modules], Norms()
    Layerwise(program, rows).run_and_observe_inputs(Stage("", tuple(paths)), norms.accumulate)
    return {path: norms.input_norms_or_empty(path) for path in paths}


# -- by outliers ---------------------------------------------------------------------------------------------


def _outlier_ratio(program: "Program", stage: Stage, input_norms_by_module: Mapping[str, list[float]]) -> float:
    """Share of a layer's weights whose score, magnitude times input norm, is above five times the layer's mean."""
    scores = [weight_score(program, path, input_norms_by_module[path]).flatten() for path in stage.modules]
    mean = sum(float(s.double().sum()) for s in scores) / sum(s.numel() for s in scores)
    return sum(int((s > OUTLIER * mean).sum()) for s in scores) / sum(s.numel() for s in scores)


def owl_sparsities(
    outlier_ratio_by_unit: Mapping[str, float], weight_count_by_unit: Mapping[str, int], mean_sparsity: float
) -> dict[str, float]:
    """Layers with more outliers keep more: shares at most 0.16 apart.

    Source: OWL (Yin et al. 2023, arXiv 2310.05175), section 3.2 and its code, the mean weighed by sizes.
    """
    low, high = min(outlier_ratio_by_unit.values()), max(outlier_ratio_by_unit.values())
    scaled = {
        unit: (r - low) * 2 * SPREAD / (high - low) if high > low else 0.0 for unit, r in outlier_ratio_by_unit.items()
    }
    mean = math.fsum(scaled[unit] * weight_count_by_unit[unit] for unit in scaled) / sum(weight_count_by_unit.values())
    targets = {unit: mean_sparsity + mean - x for unit, x in scaled.items()}
    return _solve_for_mean_sparsity(
        lambda shift: {u: min(0.999, max(0.0, w + shift)) for u, w in targets.items()},
        weight_count_by_unit,
        mean_sparsity,
    )


# -- by measured sensitivity ---------------------------------------------------------------------------------


def equal_marginal_cost_sparsities(
    sparsity_cost_pairs_by_unit: Mapping[str, Sequence[tuple[float, float]]],
    weight_count_by_unit: Mapping[str, int],
    mean_sparsity: float,
) -> dict[str, float]:
    """The shares at which one more zero costs the same in every layer.

    sparsity_cost_pairs_by_unit  two points (share, divergence in nats per token when only this layer has that share)
    Between and beyond the points a layer's cost is taken to rise exponentially, within 20% of the mean share.
    """
    curves = {}
    for unit, ((low, cheap), (high, dear)) in sparsity_cost_pairs_by_unit.items():
        cheap = max(cheap, 1e-9)
        rise = max(math.log(max(dear, cheap) / cheap) / (high - low), 1.0)
        curves[unit] = rise, math.log(cheap) - rise * low
    least, upper = max(0.0, mean_sparsity - REACH), min(0.99, mean_sparsity + REACH)

    def at(slope: float) -> dict[str, float]:
        """Shares at which the cost per weight, exp(rise * s + start) * rise / weights, is exp(slope)."""
        return {
            unit: min(upper, max(least, (slope - start - math.log(rise / weight_count_by_unit[unit])) / rise))
            for unit, (rise, start) in curves.items()
        }

    return _solve_for_mean_sparsity(at, weight_count_by_unit, mean_sparsity)


def _solve_for_mean_sparsity(
    sparsities_at_level: Callable[[float], dict[str, float]],
    weight_count_by_unit: Mapping[str, int],
    mean_sparsity: float,
) -> dict[str, float]:
    """`sparsities_at_level` of the level whose weighed mean is `mean_sparsity`; the mean rises with the level."""
    low, high = -100.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        level = sparsities_at_level(middle)
        mean = math.fsum(level[unit] * weight_count_by_unit[unit] for unit in level) / sum(
            weight_count_by_unit.values()
        )
        low, high = (middle, high) if mean < mean_sparsity else (low, middle)
    return sparsities_at_level(low)


def _probe_sparsity_costs(
    program: "Program",
    stages: Sequence[Stage],
    rows: Tensor,
    mean_sparsity: float,
    input_norms_by_module: Mapping[str, list[float]],
    journal: Journal,
    ctx: Context,
) -> dict[str, list[tuple[float, float]]]:
    """Loss of the model where one layer alone has zeros by magnitude times input norm."""
    rows = rows[: max(1, TOKENS // rows[0].numel())]
    probes = [max(0.01, mean_sparsity - STEP), min(0.99, mean_sparsity + STEP)]
    trials = [(stage, probe) for stage in stages for probe in probes]
    probing: list[_SparsityProbe] = []  # made when the first answer is not known yet

    def cost(stage: Stage, probe: float) -> float:
        if not probing:
            probing.append(_SparsityProbe(program, rows))
        return probing[0].divergence_with_zeros(stage, probe, input_norms_by_module)

    costs: dict[str, list[tuple[float, float]]] = {stage.unit: [] for stage in stages}
    for stage, probe in ctx.each(trials, "probes", len(trials)):
        nats = journal.get_or_compute(f"{stage.unit} {probe:.4f}", partial(cost, stage, probe))
        costs[stage.unit].append((probe, nats))
    return costs


class _SparsityProbe:
    """Divergence of the model with one layer changed from the model as it is; layers in front are not run."""

    def __init__(self, program: "Program", rows: Tensor):
        self.program, self.rows = program, rows
        self.outputs: list[Tensor] = []  # log-probabilities of the model as it is, by batch
        self.prefix = Prefix(program, CACHE_BYTES)
        self.prefix.measure_from(self._record_first_outputs_or_measure_divergence)

    def divergence_with_zeros(
        self, stage: Stage, sparsity: float, input_norms_by_module: Mapping[str, list[float]]
    ) -> float:
        return self.prefix.measure_from(
            self._record_first_outputs_or_measure_divergence,
            stage.unit,
            partial(_with_temporary_zeros, self.program, stage, sparsity, input_norms_by_module),
        )

    def _record_first_outputs_or_measure_divergence(self) -> float:
        total, first = 0.0, not self.outputs
        with evaluating(self.program.model):
            for number, batch in enumerate(memory_batches(self.program.model, self.rows)):
                args, kwargs = forward_args_and_kwargs(self.program.model, batch)
                output = self.program.model(*args, **kwargs)
                outputs, distance = main_tensor_of_output(output).float(), _squares
                if has_logits(output):
                    outputs, distance = outputs.log_softmax(-1), _divergence
                if first:
                    self.outputs.append(outputs)
                total += distance(outputs, self.outputs[number]).item()
        return total / self.rows.numel()


def _divergence(outputs: Tensor, reference: Tensor) -> Tensor:
    return nn.functional.kl_div(outputs, reference, reduction="sum", log_target=True)


def _squares(outputs: Tensor, reference: Tensor) -> Tensor:
    """Relative squared error of hidden states, summed over tokens."""
    return (outputs - reference).square().sum() / reference.square().mean((0, 1)).sum().clamp(min=1e-30)


@contextmanager
def _with_temporary_zeros(
    program: "Program", stage: Stage, sparsity: float, input_norms_by_module: Mapping[str, list[float]]
) -> Iterator[None]:
    """A layer with zeros for as long as the context lasts."""
    with ExitStack() as stack:
        for path in stage.modules:
            weight = tensor_at(program.model, f"{path}.weight")
            stack.callback(setattr, weight, "data", weight.data)
            keep = keep_mask(weight_score(program, path, input_norms_by_module[path]), sparsity, "any", "row")
            turned = isinstance(program.model.get_submodule(path), Conv1D)
            weight.data = torch.where(keep.T if turned else keep, weight.data, 0.0)
        yield


def allocation_token_count(method: str, unit_count: int, rows: Tensor) -> int:
    """Tokens through the whole model that it takes: a look at the inputs, and half of the model for every probe."""
    if method == "uniform":
        return 0
    sampled_tokens = max(1, TOKENS // rows[0].numel()) * rows[0].numel()
    return token_or_image_count(rows) + (sampled_tokens * (unit_count + 2) if method == "searched" else 0)
