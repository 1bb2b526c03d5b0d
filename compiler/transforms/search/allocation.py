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


def allocate_layer_sparsity(
    program: "Program",
    stages: Sequence[Stage],
    rows: Tensor,
    sparsity: float,
    method: str,
    weight_counts: Mapping[str, int],
    ctx: Context,
) -> dict[str, float]:
    """The share of zeros of each stage by its unit; those outside of all units take `sparsity`.

    weight_counts   weights of each module
    Stages weighed by their weights, the mean is `sparsity`.
    """
    inside = [s for s in stages if s.unit]
    if method == "uniform" or not inside:
        return {s.unit: sparsity for s in stages}
    weights = {s.unit: sum(weight_counts[path] for path in s.modules) for s in inside}
    journal = Journal(ctx.workdir / "allocation.jsonl")
    norms = journal.get_or_compute("norms", lambda: _norms(program, inside, rows))
    if method == "owl":
        ratios = {s.unit: journal.get_or_compute(s.unit, partial(_outliers, program, s, norms)) for s in inside}
        spread = owl_sparsities(ratios, weights, sparsity)
    else:
        spread = equal_cost_sparsities(
            _sparsity_costs(program, inside, rows, sparsity, norms, journal, ctx), weights, sparsity
        )
    return {s.unit: spread.get(s.unit, sparsity) for s in stages}


def _norms(program: "Program", stages: Sequence[Stage], rows: Tensor) -> dict[str, list[float]]:
    paths, norms = [path for stage in stages for path in stage.modules], Norms()
    Layerwise(program, rows).observe_inputs(Stage("", tuple(paths)), norms.listen)
    return {path: norms.of(path) for path in paths}


# -- by outliers ---------------------------------------------------------------------------------------------


def _outliers(program: "Program", stage: Stage, norms: Mapping[str, list[float]]) -> float:
    """Share of a layer's weights whose score, magnitude times input norm, is above five times the layer's mean."""
    scores = [weight_score(program, path, norms[path]).flatten() for path in stage.modules]
    mean = sum(float(s.double().sum()) for s in scores) / sum(s.numel() for s in scores)
    return sum(int((s > OUTLIER * mean).sum()) for s in scores) / sum(s.numel() for s in scores)


def owl_sparsities(
    outlier_ratios: Mapping[str, float], weight_counts: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Layers with more outliers keep more: shares at most 0.16 apart.

    Source: OWL (Yin et al. 2023, arXiv 2310.05175), section 3.2 and its code, the mean weighed by sizes.
    """
    low, high = min(outlier_ratios.values()), max(outlier_ratios.values())
    scaled = {unit: (r - low) * 2 * SPREAD / (high - low) if high > low else 0.0 for unit, r in outlier_ratios.items()}
    mean = math.fsum(scaled[unit] * weight_counts[unit] for unit in scaled) / sum(weight_counts.values())
    targets = {unit: sparsity + mean - x for unit, x in scaled.items()}
    return _solve_for_mean(
        lambda shift: {u: min(0.999, max(0.0, w + shift)) for u, w in targets.items()}, weight_counts, sparsity
    )


# -- by measured sensitivity ---------------------------------------------------------------------------------


def equal_cost_sparsities(
    probed_costs: Mapping[str, Sequence[tuple[float, float]]], weight_counts: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """The shares at which one more zero costs the same in every layer.

    probed_costs    unit -> (share, divergence in nats per token when only this layer has that share), two points
    Between and beyond the points a layer's cost is taken to rise exponentially, within 20% of the mean share.
    """
    curves = {}
    for unit, ((low, cheap), (high, dear)) in probed_costs.items():
        cheap = max(cheap, 1e-9)
        rise = max(math.log(max(dear, cheap) / cheap) / (high - low), 1.0)
        curves[unit] = rise, math.log(cheap) - rise * low
    least, upper = max(0.0, sparsity - REACH), min(0.99, sparsity + REACH)

    def at(slope: float) -> dict[str, float]:
        """Shares at which the cost per weight, exp(rise * s + start) * rise / weights, is exp(slope)."""
        return {
            unit: min(upper, max(least, (slope - start - math.log(rise / weight_counts[unit])) / rise))
            for unit, (rise, start) in curves.items()
        }

    return _solve_for_mean(at, weight_counts, sparsity)


def _solve_for_mean(
    sparsities_at: Callable[[float], dict[str, float]], weight_counts: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """`sparsities_at` of the number at which the weighed mean is `sparsity`; the mean rises with the number."""
    low, high = -100.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        level = sparsities_at(middle)
        mean = math.fsum(level[unit] * weight_counts[unit] for unit in level) / sum(weight_counts.values())
        low, high = (middle, high) if mean < sparsity else (low, middle)
    return sparsities_at(low)


def _sparsity_costs(
    program: "Program",
    stages: Sequence[Stage],
    rows: Tensor,
    sparsity: float,
    norms: Mapping[str, list[float]],
    journal: Journal,
    ctx: Context,
) -> dict[str, list[tuple[float, float]]]:
    """Loss of the model where one layer alone has zeros by magnitude times input norm."""
    rows = rows[: max(1, TOKENS // rows[0].numel())]
    probes = [max(0.01, sparsity - STEP), min(0.99, sparsity + STEP)]
    trials = [(stage, probe) for stage in stages for probe in probes]
    probing: list[_Probing] = []  # made when the first answer is not known yet

    def cost(stage: Stage, probe: float) -> float:
        if not probing:
            probing.append(_Probing(program, rows))
        return probing[0].cost(stage, probe, norms)

    costs: dict[str, list[tuple[float, float]]] = {stage.unit: [] for stage in stages}
    for stage, probe in ctx.each(trials, "probes", len(trials)):
        nats = journal.get_or_compute(f"{stage.unit} {probe:.4f}", partial(cost, stage, probe))
        costs[stage.unit].append((probe, nats))
    return costs


class _Probing:
    """Divergence of the model with one layer changed from the model as it is; layers in front are not run."""

    def __init__(self, program: "Program", rows: Tensor):
        self.program, self.rows = program, rows
        self.outputs: list[Tensor] = []  # log-probabilities of the model as it is, by batch
        self.prefix = Prefix(program, CACHE_BYTES)
        self.prefix.measure_from(self._divergence_from_first_run)

    def cost(self, stage: Stage, sparsity: float, norms: Mapping[str, list[float]]) -> float:
        return self.prefix.measure_from(
            self._divergence_from_first_run,
            stage.unit,
            partial(_with_temporary_zeros, self.program, stage, sparsity, norms),
        )

    def _divergence_from_first_run(self) -> float:
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
    program: "Program", stage: Stage, sparsity: float, norms: Mapping[str, list[float]]
) -> Iterator[None]:
    """A layer with zeros for as long as the context lasts."""
    with ExitStack() as stack:
        for path in stage.modules:
            weight = tensor_at(program.model, f"{path}.weight")
            stack.callback(setattr, weight, "data", weight.data)
            keep = keep_mask(weight_score(program, path, norms[path]), sparsity, "any", "row")
            turned = isinstance(program.model.get_submodule(path), Conv1D)
            weight.data = torch.where(keep.T if turned else keep, weight.data, 0.0)
        yield


def effort(method: str, units: int, rows: Tensor) -> int:
    """Tokens through the whole model that it takes: a look at the inputs, and half of the model for every probe."""
    if method == "uniform":
        return 0
    sampled_tokens = max(1, TOKENS // rows[0].numel()) * rows[0].numel()
    return token_or_image_count(rows) + (sampled_tokens * (units + 2) if method == "searched" else 0)
