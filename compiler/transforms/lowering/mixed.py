"""Allocation of number formats and zeros to linear modules under one budget, by a knapsack.

Every module takes one option. What an option loses is measured with all other modules as they are at the moment; the
sum of those losses is least under the budget by a mixed-integer program. Modules interact, so the losses are measured
again around the solution, and the program is solved again, as long as the model together loses less.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ....kernels.grid import Grid
from ...core.cache import canonical_json_sha256
from ...core.events import iterate_and_report
from ...ir.layers.linear import KernelLinear, weight_of
from ...ir.program import Program
from ..search.layerwise import Grams, Layerwise, Stage
from ..search.masks import keep_mask, magnitude, masked_copy
from ..search.prefix import Prefix
from ..search.quantizing import nonzero_mask
from ..search.updates import solve_gptq

ROUNDS = 2  # of solving, at most: a third one gains next to nothing


@dataclass(frozen=True)
class Option:
    """A kernel for a module, over a weight of which a share is zero, or that is on a grid of four bits.

    group   inputs of an output that share a scale of that grid; 0 where the kernel rounds by itself
    """

    kernel: str
    zeros: float = 0.0
    group: int = 0


Allocation = dict[str, Option]  # by module
Losses = dict[str, list[float]]  # of each option of each module
Cost = Mapping[str, Sequence[float]]


def choose_option_indices(losses: Losses, costs: Cost, budget: float) -> dict[str, int]:
    """Index of an option for each module: the least sum of losses whose costs keep the budget.

    Where no choice keeps it, the cheapest option of each module. Source: the multiple-choice knapsack problem
    (Kellerer et al. 2004, "Knapsack Problems", chapter 11), by HiGHS through scipy.
    """
    from scipy.optimize import LinearConstraint, milp

    paths = list(losses)
    sizes = [len(losses[path]) for path in paths]
    cheapest = {path: int(np.argmin(costs[path])) for path in paths}
    if sum(costs[path][index] for path, index in cheapest.items()) > budget:
        return cheapest
    starts = np.concatenate([[0], np.cumsum(sizes)])
    one_each = np.zeros((len(paths), starts[-1]))
    for row, (start, end) in enumerate(pairwise(starts)):
        one_each[row, start:end] = 1
    flat_costs = np.array([c for path in paths for c in costs[path]], float)[None]
    result = milp(
        np.array([loss for path in paths for loss in losses[path]]),
        integrality=np.ones(starts[-1]),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(flat_costs / budget, -np.inf, 1.0)],
    )
    assert result.x is not None, f"a knapsack with a solution has none: {result.message}"
    picked = np.split(result.x, starts[1:-1])
    return {path: int(np.argmax(options)) for path, options in zip(paths, picked, strict=True)}


def wanda_pruned_weight(weight: Tensor, zero_share: float, input_norms: Tensor) -> Tensor:
    """A weight without the share of each row that matters least by Wanda's score; `input_norms` are [in]."""
    score = magnitude(weight)
    keep = keep_mask(score * input_norms.to(score), zero_share, "any", "row")
    return masked_copy(weight, keep)


def _linear_with_weight(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = bias
    return module


@dataclass
class Packer:
    """Linear modules on their options: four bits by GPTQ, zeros by Wanda's score.

    modules   by path, as they are
    norms     roots of the summed squares of each input, [in]; of a module that no row reached ones
    int4      modules on grids of four bits, by path and group
    """

    modules: Mapping[str, nn.Module]
    norms: dict[str, Tensor] = field(default_factory=dict)
    int4: dict[tuple[str, int], KernelLinear] = field(default_factory=dict)

    def observe_inputs_and_quantize(
        self, program: Program, stages: Iterable[Stage], rows: Tensor, options_by_path: Mapping[str, list[Option]]
    ) -> None:
        """Run rows through the model, stage by stage, and keep what options need of the inputs of their modules."""
        layerwise = Layerwise(program, rows)
        for stage in iterate_and_report(list(stages), "four bits"):
            grams = Grams()
            layerwise.run_and_observe_inputs(stage, grams.accumulate)
            for path in stage.modules:
                weight, gram = weight_of(self.modules[path]), grams.finite_gram_or_none(path)
                self.norms[path] = torch.ones(weight.shape[1]) if gram is None else gram.diagonal().sqrt()
                for option in options_by_path[path]:
                    if option.group and gram is not None:
                        grid = Grid(4, option.group, False, True)
                        weight4 = solve_gptq(weight, gram, grid, "activation", nonzero_mask(weight), sweep_count=2)
                        self.int4[path, option.group] = self._kernel(path, option.kernel, weight4.to(weight.dtype))

    def pack(self, path: str, option: Option) -> KernelLinear:
        """A module on an option."""
        module = self.modules[path]
        if option.zeros:
            return self._kernel(
                path, option.kernel, wanda_pruned_weight(weight_of(module), option.zeros, self.norms[path])
            )
        return self.int4.get((path, option.group)) or KernelLinear.of(module, option.kernel)

    def _kernel(self, path: str, kernel: str, weight: Tensor) -> KernelLinear:
        return KernelLinear.of(_linear_with_weight(weight, getattr(self.modules[path], "bias", None)), kernel)


@dataclass
class Allocator:
    """Options of modules of a model, and what they cost.

    options   of each module
    costs     of each option, in the budget's unit
    pack      a module on an option
    loss      of the model as it is now
    remember  computes a value by a key, unless an earlier run of the step did
    prefix    of the model as it is now, which keeps what its layers give; None runs whole models
    """

    model: nn.Module
    options: Mapping[str, Sequence[Option]]
    costs: Cost
    budget: float
    pack: Callable[[str, Option], nn.Module]
    loss: Callable[[], float]
    remember: Callable[[str, Callable[[], list[float]]], list[float]] = lambda key, compute: compute()
    prefix: Callable[[], Prefix | None] = lambda: None

    def allocate_and_list_round_losses(self) -> tuple[Allocation, list[float]]:
        """The best allocation, and the losses of the model on the solutions, one a round; the model is as before."""
        originals = {path: self.model.get_submodule(path) for path in self.options}
        best: Allocation | None = None
        history: list[float] = []
        try:
            for number in range(ROUNDS):
                losses = self.measure_option_losses(number, best)
                chosen = choose_option_indices(losses, self.costs, self.budget)
                allocation = {path: self.options[path][index] for path, index in chosen.items()}
                if allocation == best:
                    break
                for path, option in allocation.items():
                    self.model.set_submodule(path, self.pack(path, option))
                history.append(self.loss())
                if best is not None and history[-1] >= min(history[:-1]):
                    break
                best = allocation
        finally:
            for path, module in originals.items():
                self.model.set_submodule(path, module)
        assert best is not None, "the first solution is an allocation"
        return best, history

    def measure_option_losses(self, round_index: int, surrounding_allocation: Allocation | None = None) -> Losses:
        """Loss of every option, all other modules as the allocation has them, in a round of that number."""
        paths = iterate_and_report(list(self.options), f"losses of modules, round {round_index + 1}")
        around = (
            canonical_json_sha256(repr(surrounding_allocation)) if surrounding_allocation else round_index
        )  # times differ, and so may what they choose
        prefix = self.prefix()
        return {
            path: self.remember(f"{around} {path}", partial(self._measure_module_option_losses, path, prefix))
            for path in paths
        }

    def _measure_module_option_losses(self, path: str, prefix: Prefix | None) -> list[float]:
        present, losses = self.model.get_submodule(path), []
        if prefix is not None and prefix.chain is None:
            prefix.measure_from(self.loss)
        try:
            for option in self.options[path]:
                self.model.set_submodule(path, self.pack(path, option))
                losses.append(self.loss() if prefix is None else prefix.measure_from(self.loss, prefix.unit_of(path)))
        finally:
            self.model.set_submodule(path, present)
        return losses
