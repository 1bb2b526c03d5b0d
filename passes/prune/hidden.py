"""Make the residual stream narrower."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from ...compiler.analysis.discovery.streams import skeleton_with_stream
from ...compiler.analysis.planning.stream_width import remaining_width, require_stream, with_stream_width
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, Lossy, Pass, param
from ...compiler.transforms.editing.dry_run import dry_run_or_reject
from ...compiler.transforms.editing.rewrite import Rewriter
from ...compiler.transforms.search import stream as streams
from ...compiler.transforms.search.effort import estimate_fitting_effort
from ...compiler.transforms.search.importance import ascending_indices, l1_importance
from ...compiler.transforms.search.widths import slice_group
from ...dsl.checker.rules import Conflict, Problem, Unread
from ...dsl.checker.skeleton import Group, Skeleton
from ...dsl.checker.values import DataRef, Ratio

if TYPE_CHECKING:
    from torch import Tensor

    from ...compiler.transforms.search.reconstruct import Moments


class Hidden(Pass):
    """Make the residual stream narrower.

    A channel of the stream goes from every layer at once: from embeddings, positions and norms, from all that reads
    the stream or adds to it, and from the head. All layers stay alike, so the result is a stock checkpoint where a
    config can say the width of a head beside that of the stream. With `data` those channels go that matter least to
    what is computed of the rows, and what reads the stream is refitted to do without; else those of least weight
    magnitude go. The norms' means run over the channels that stay. `prune.multi` costs much less at as many
    parameters, where layers may differ; `tune.heal` what this leaves.

    Source: Minitron (Muralidharan et al. 2024, arXiv 2407.14679), section 2, with `reorder: norms` and
    `repair: false`; `reorder: wanda` and repair: own.
    Example: slim = prune.hidden(keep: 75% of width, align: 16, data: calib)
    """

    keeps = Lossy()
    acts_on = "width"
    changes = ("weights",)
    determinism = "deterministic"

    keep: Ratio = param(
        "Share of the stream's channels, or of all parameters, that stays.", of=("width", "params"), gt=0, le=1
    )
    data: DataRef | None = param("Rows on which channels are ranked, and what reads them refitted.", default=None)
    reorder: Literal["l1", "norms", "wanda"] | None = param(
        "Which channels go first: by weights, by what norms give, or by the share of the readers' outputs that comes "
        "through them; wanda with data, else l1.",
        default=None,
    )
    repair: bool = param("With data, refit what reads the channels that go.", default=True)
    align: int = param(
        "The width is a multiple of this, the largest that is at most `keep`.", default=64, ge=1, unit="channels"
    )

    def problems(self) -> Iterator[Problem]:
        if self.data is None:
            yield Unread(("repair",), "`data`", ("data",))
        if self.data is None and self.reorder in ("norms", "wanda"):
            yield Conflict(
                ("reorder",),
                "activations decide this order, and no `data` names rows",
                "add `data`, or take `reorder: l1`",
            )

    def run(self, program: Program, ctx: Context) -> None:
        stream = streams.require_stream_of_model(program)
        count = remaining_width(skeleton_with_stream(program), self.keep, self.align)
        moments = None
        if self.data and (self.repair or self.reorder in (None, "wanda")):
            modules = [path for path, _ in streams.matrix_readers(program, stream)]
            moments = streams.collect_moments(program, ctx, modules, self.data)
        removed = set(
            ascending_indices(self._channel_importance(program, ctx, stream, moments))[: stream.count - count]
        )
        if not removed:
            return
        dry_run_or_reject(
            program,
            f"{len(removed)} channels of the residual stream",
            lambda trial: self._remove_channels(trial, stream, removed),
            remedy="narrow what is inside of layers: `prune.channels`, `prune.heads`",
        )
        if self.repair and moments is not None:
            streams.refit_readers(program, ctx, stream, moments, sorted(removed))
        self._remove_channels(program, stream, removed)

    def _channel_importance(self, program: Program, ctx: Context, stream: Group, moments: "Moments | None") -> "Tensor":
        if self.data is None or self.reorder == "l1":
            return l1_importance(program, stream)
        if self.reorder == "norms":
            return streams.measure_norm_importance(program, ctx, stream, self.data)
        assert moments is not None, "no rows were read"
        return streams.energy_importance(program, stream, moments)

    def _remove_channels(self, program: Program, stream: Group, removed_channels: set[int]) -> None:
        with Rewriter(program) as rewrite:
            slice_group(program, rewrite, stream, removed_channels)

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        return with_stream_width(skeleton, remaining_width(skeleton, self.keep, self.align))

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        return estimate_fitting_effort(skeleton, ctx, [require_stream(skeleton)], self.data) if self.data else Effort()
