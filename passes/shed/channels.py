"""Make the inner width of Mamba-1 mixers smaller."""

from typing import Literal

from ...compiler.ir.program import Program
from ...compiler.planning.select import groups
from ...compiler.search.mixers import Shed
from ...compiler.words.context import Context
from ...compiler.words.kinds import Lossy, Pass, param
from ...dsl.skeleton import Skeleton
from ...dsl.values import DataRef, MetricRef, Ratio, Selector


class Channels(Pass):
    """Make the inner width of Mamba-1 mixers smaller.

    A channel of a Mamba-1 mixer (of Mamba, FalconMamba, Jamba) has a time step and a state of its own: with it go its
    row and its gate's row of the input projection, its filter of the convolution, its rows of `dt_proj`, `A_log` and
    `D`, and its columns of `x_proj` and of the output projection; the cache keeps one row less. Channels of Mamba-2
    come in heads that share a time step, see `shed.heads`.

    Without a score every mixer keeps the same share and the channels of least weight magnitude go, which leaves a
    stock checkpoint where the config has a word for the width. With one mixers compete, `align` channels at a time;
    the score's rows decide which go first, and what reads them is refitted by least squares to do without.

    Source: own; the search as in `prune.channels`.
    Example: thin = shed.channels(keep: 75% of channels, align: 32)
    """

    keeps = Lossy()
    acts_on = "ssm_channels"
    makes = {"score": "uneven scans"}
    determinism = "deterministic"

    keep: Ratio = param("Share of the channels, or with a score of the whole model, that stays.",
                        of=("channels", "params", "flops", "bytes"), gt=0, le=1)
    on: Selector | None = param("Which mixers.", default=None)
    align: int = param("Widths are multiples of this where they were, and it is the step of the search.", default=16,
                       ge=1, unit="channels")
    score: MetricRef | None = param("What decides which mixers lose more; without it all lose alike.", default=None)
    search: Literal["racing", "exact"] = param("With a score: try what may be best, or everything.", default="racing")
    repair: bool = param("With a score, refit what reads the channels that go.", default=True)
    data: DataRef | None = param("Rows that rank channels and refit readers; unless given, 32 that the model writes.",
                                 default=None)

    def run(self, program: Program, ctx: Context) -> None:
        self._shed(program.skeleton).run(program, ctx)

    def _shed(self, skeleton: Skeleton) -> Shed:
        return Shed("ssm_channels", self.keep, groups(skeleton, "ssm_channels", self.on), self.align, self.score,
                    self.search, self.repair, self.data)

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        return self._shed(skeleton).forecast(skeleton)

    def forwards(self, skeleton: Skeleton) -> int:
        return self._shed(skeleton).forwards(skeleton)
