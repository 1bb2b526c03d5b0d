"""By how much channels are scaled before their readers' weights are rounded: the factor for which least is lost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ....kernels.grid import Grid
from ...ir.layers.linear import weight_of
from ...ir.surgery import tensor_at
from .folds import Fold, output_count_of
from .layerwise import Grams
from .reconstruct import as_matrix_inputs as rows_of

N_TRIALS = 10  # exponents of each kind
SAMPLE = 512  # tokens on which the rounding of inputs is judged
WIDEST = 8  # a factor is at most two to this power
MAX_CODE = 127  # the largest code of an input in int8


@dataclass
class InputStatistics:
    """Input statistics of a layer's modules: sums of x x^T over all tokens, and some of the tokens themselves.

    tokens   how many there were, by module
    """

    grams: Grams = field(default_factory=Grams)
    samples: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def accumulate(self, module_path: str, module: nn.Module, inputs: Tensor) -> None:
        self.grams.accumulate(module_path, module, inputs)
        rows = rows_of(module, inputs)
        self.tokens[module_path] = self.tokens.get(module_path, 0) + len(rows)
        sample = self.samples.get(module_path, rows[:0])
        if len(sample) < SAMPLE:
            self.samples[module_path] = torch.cat([sample, rows[: SAMPLE - len(sample)]])


@dataclass
class Scaling:
    """Factors of a layer's modules, and what is lost by rounding with them.

    weights    [out, in] float32 by path, of the modules that are to be rounded
    inputs     [in] by path: what a weight's columns are multiplied with, and its inputs divided by
    outputs    [out] by path: what a weight's rows are divided by
    in_int8    whether inputs are rounded, too, token by token, as the kernels of int8 weights do
    """

    model: nn.Module
    grid: Grid
    sums: InputStatistics
    weights: dict[str, Tensor]
    in_int8: bool = False
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = {path: torch.ones_like(w[0]) for path, w in self.weights.items()}
        self.outputs = {path: torch.ones_like(w[:, 0]) for path, w in self.weights.items()}

    @staticmethod
    def of(model: nn.Module, grid: Grid, sums: InputStatistics, paths: Sequence[str], in_int8: bool) -> "Scaling":
        return Scaling(model, grid, sums, {p: weight_of(model.get_submodule(p)).float() for p in paths}, in_int8)

    def squared_output_error_sum(
        self, module_path: str, input_factors: Tensor, output_factors: Tensor, grid: Grid
    ) -> float:
        """Squared error of a module's outputs over all tokens, in the size that they had; 0 of one that was not run."""
        gram, weight = self.sums.grams.finite_gram_or_none(module_path), self.weights[module_path]
        if gram is None:
            return 0.0
        scaled = weight * input_factors / output_factors[:, None]
        rounded = grid.fit_scales(scaled).round(scaled)
        off = rounded * output_factors[:, None] / input_factors - weight
        total = float(((off @ gram) * off).sum(dtype=torch.float64))
        if self.in_int8:
            samples = self.sums.samples[module_path] / input_factors
            step = (samples.abs().amax(1, keepdim=True) / MAX_CODE).clamp(min=torch.finfo(torch.float32).tiny)
            error = ((samples / step).round() * step - samples) @ rounded.T * output_factors
            total += float(error.square().sum(dtype=torch.float64)) * self.sums.tokens[module_path] / len(samples)
        return total

    def error_with_fold(self, fold: Fold, channel_factors: Tensor, grid: Grid) -> float:
        """Error in all modules that a fold changes."""
        total = 0.0
        for reader in fold.readers:
            if reader.path in self.weights:
                factors = fold.input_factors_of(reader, channel_factors, len(self.inputs[reader.path]))
                total += self.squared_output_error_sum(
                    reader.path, self.inputs[reader.path] * factors, self.outputs[reader.path], grid
                )
        if fold.writer in self.weights:
            less = self._output_divisors(fold, channel_factors)
            total += self.squared_output_error_sum(
                fold.writer, self.inputs[fold.writer], self.outputs[fold.writer] * less, grid
            )
        return total

    def _output_divisors(self, fold: Fold, factors: Tensor) -> Tensor:
        less = torch.ones(output_count_of(self.model.get_submodule(fold.writer)), device=factors.device)
        less[list(fold.rows)] = factors
        return less

    def best_factors_or_none(self, fold: Fold) -> Tensor | None:
        """The factor of least loss, [channels]; None where none is better than to leave all as it is.

        Exponents are compared on scales that reach the largest weight, the winner with none on the grid itself.
        """
        quick, one = replace(self.grid, search=False), torch.ones(len(fold.rows), device=self._device(fold))
        before, best_factor = self.error_with_fold(fold, one, quick), None
        least = before
        for by in self._candidate_factors(fold):
            if (loss := self.error_with_fold(fold, by, quick)) < least:
                least, best_factor = loss, by
        if best_factor is not None and self.grid.search:
            better = self.error_with_fold(fold, best_factor, self.grid) < self.error_with_fold(fold, one, self.grid)
            best_factor = best_factor if better else None
        return best_factor

    def multiply_in_factors(self, fold: Fold, channel_factors: Tensor) -> None:
        """Scale by this from now on."""
        for reader in fold.readers:
            if reader.path in self.weights:
                self.inputs[reader.path] *= fold.input_factors_of(
                    reader, channel_factors, len(self.inputs[reader.path])
                )
        if fold.writer in self.weights:
            self.outputs[fold.writer] *= self._output_divisors(fold, channel_factors)

    def _device(self, fold: Fold) -> torch.device:
        return tensor_at(self.model, f"{fold.writer}.weight").device

    def _candidate_factors(self, fold: Fold) -> Iterator[Tensor]:
        """Factors: powers of how large a channel is, and those divided by powers of how large its weights are, each
        the nearest power of two, which rounds nothing in any type.

        Source: AWQ (Lin et al. 2023, arXiv 2306.00978), section 3.2 and its code's `duo_scaling`, which are
        SmoothQuant's (Xiao et al. 2022, arXiv 2211.10438), section 4.
        """
        activation_size, weighed = self._input_rms_and_max_weight(fold)
        alive, activation_powers = (activation_size > 0) & (weighed > 0), set()
        if not bool(alive.any()):
            return
        for step in range(1, N_TRIALS + 1):
            share = step / N_TRIALS
            for by in (activation_size**share, activation_size**share / weighed ** (1 - share)):
                size = torch.where(alive, by, 1.0).log2()
                middle = (size[alive].max() + size[alive].min()) / 2
                powers = torch.where(alive, (size - middle).round().clamp(-WIDEST, WIDEST), 0.0)
                if (key := tuple(powers.tolist())) not in activation_powers:
                    activation_powers.add(key)
                    yield fold.nearest_representable_factors(self.model, 2.0**powers)

    def _input_rms_and_max_weight(self, fold: Fold) -> tuple[Tensor, Tensor]:
        """[channels]: the root mean square of each, and the largest weight that reads it, over the fold's readers."""
        squares, weighed, count = torch.zeros(3, len(fold.rows), device=self._device(fold))
        for reader in fold.readers:
            gram = self.sums.grams.finite_gram_or_none(reader.path) if reader.path in self.weights else None
            if gram is None:
                continue
            channels = torch.tensor(reader.channels, device=squares.device)
            inputs = list(reader.inputs)
            squares.index_add_(0, channels, gram.diagonal()[inputs])
            count.index_add_(0, channels, torch.full((len(inputs),), float(self.sums.tokens[reader.path])).to(squares))
            weighed.scatter_reduce_(0, channels, self.weights[reader.path][:, inputs].abs().amax(0), "amax")
        return (squares / count.clamp(min=1)).sqrt(), weighed
