"""Channels of the residual stream: which matter least, and what reads them refitted to do without."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ....dsl.checker.skeleton import Group, Member
from ....dsl.checker.values import DataRef
from ...analysis.discovery.streams import stream_group_or_refusal
from ...analysis.planning.stream_width import fixed_stream_diagnostic
from ...core.device import memory_budget_bytes_on
from ...ir.surgery import modules_holding_tensor, tensor_at
from ...models.rows.forward import evaluating, memory_batches, outputs
from .reconstruct import Moments, Reconstruction, as_matrix, has_moments, module_of, readers
from .unpadded import unpadded_rows_by_length

if TYPE_CHECKING:
    from ...ir.program import Program
    from ...plugin.context import Context


def require_stream_of_model(program: "Program") -> Group:
    """The stream's channels as a program has them now; Reject (fixed-width) where they can't go."""
    stream = stream_group_or_refusal(program)
    if isinstance(stream, str):
        raise fixed_stream_diagnostic(type(program.model).__name__, stream).rejection()
    return stream


def matrix_readers(program: "Program", stream: Group) -> Iterator[tuple[str, Member]]:
    """Modules that multiply the stream by a matrix; a head that is tied to the embedding, too."""
    for member in stream.members:
        tied = modules_holding_tensor(program.model, tensor_at(program.model, member.tensor))
        for path in [path for path, module, _ in tied if isinstance(module, nn.Linear)]:
            if member.axis == 1:
                yield path, replace(member, tensor=f"{path}.weight")
        linear = isinstance(program.model.get_submodule(module_of(member)), nn.Linear)
        if member in readers(stream) and not linear and has_moments(program.model, member):
            yield module_of(member), member


def collect_moments(
    program: "Program", ctx: "Context", module_paths: Sequence[str], data: DataRef, max_rows: int | None = None
) -> Moments:
    """Second moments of what modules are given, over `max_rows` rows of data without their padding."""
    moments = Moments(ctx.workdir / "moments")
    rows = [
        batch for part in unpadded_rows_by_length(ctx, data, max_rows) for batch in memory_batches(program.model, part)
    ]

    def run() -> None:
        with evaluating(program.model):
            for batch in ctx.each(rows, f"reading {data.name}"):
                outputs(program.model, batch)

    settings = ctx.settings
    moments.collect_missing_and_count_passes(
        program, module_paths, run, memory_budget_bytes_on(settings.device, settings.max_memory)
    )
    return moments


def energy_importance(program: "Program", stream: Group, moments: Moments) -> Tensor:
    """[count] float64: the share of each reader's output energy that comes through a channel, over all readers.

    With x the reader's inputs, of a channel i: |W_i|^2 E[x_i^2] / E[|W x|^2].
    Source: Wanda's score (Sun et al. 2023, arXiv 2306.11695) squared, so that it adds up; the share: own.
    """
    total = torch.zeros(stream.count, dtype=torch.float64)
    for path, member in matrix_readers(program, stream):
        moment = moments.load_moment(path)
        if moment is None:
            continue
        weight = tensor_at(program.model, member.tensor).detach()
        matrix = as_matrix(weight, member).cpu().double()
        moment = moment.double()
        energy = ((matrix @ moment) * matrix).sum().clamp(min=1e-30)
        through = matrix.square().sum(0) * moment.diagonal() / energy
        through = through.reshape(weight.shape[member.axis], -1).sum(1)  # over the places of a convolution's kernel
        for start, size in member.segments:
            total += through[start : start + stream.count * size].reshape(stream.count, size).sum(1)
    return total


def measure_norm_importance(program: "Program", ctx: "Context", stream: Group, data: DataRef) -> Tensor:
    """[count] float64: magnitude of each channel behind the stream's norms, summed over norms.

    Of a row the mean over its tokens, over rows the root of the summed squares.
    Source: Minitron (Muralidharan et al. 2024, arXiv 2407.14679), section 2.2, importance of embedding channels.
    """
    sums: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        def add(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            rows = output.detach().abs().flatten(1, -2).mean(1) if output.ndim > 2 else output.detach().abs()
            sums[path] = sums.get(path, 0) + rows.double().square().sum(0).cpu()

        return add

    paths = dict.fromkeys(module_of(m) for m in stream.members if m.axis == 0)
    norms = {path: program.model.get_submodule(path) for path in paths}
    handles = [
        module.register_forward_hook(hook(path)) for path, module in norms.items() if "Norm" in type(module).__name__
    ]
    try:
        with evaluating(program.model):
            for batch in ctx.each(list(memory_batches(program.model, ctx.rows(data))), f"reading {data.name}"):
                outputs(program.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    magnitudes = [squares.sqrt() for squares in sums.values() if len(squares) == stream.count]
    assert magnitudes, "a stream was found whose norms are no modules"
    return torch.stack(magnitudes).sum(0)


def refit_readers(
    program: "Program", ctx: "Context", stream: Group, moments: Moments, removed_channels: Sequence[int]
) -> None:
    """Let what reads the stream do without some channels: least squares over moments, one matrix after another."""
    for member in ctx.each(readers(stream), "refitting", stream.readers):
        only = replace(stream, members=(member,), readers=1)
        for path, weight in (
            Reconstruction(program, moments).refitted_or_zeroed_reader_weights(only, (), removed_channels).items()
        ):
            program.model.get_parameter(path).data = weight
    program.changed()
