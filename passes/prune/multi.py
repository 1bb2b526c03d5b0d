"""Prune blocks, MLP channels and attention heads, whatever the model misses least."""

from collections.abc import Iterator
from typing import Literal

from ...compiler.analysis.planning.amount import Amount
from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.competing_pruner import CompetingPruner
from ...compiler.transforms.search.greedy import GreedySearch
from ...compiler.transforms.search.latency import no_clock
from ...compiler.transforms.search.parts import select_parts
from ...dsl.checker.rules import Problem, Unread
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import MetricRef, ProfileRef, Ratio, Selector, Shares


class Multi(CompetingPruner):
    """Prune blocks, MLP channels and attention heads, whatever the model misses least.

    Candidates are every residual branch, the least important `group` channels of every MLP and the least
    important `heads` KV heads, with the query heads they serve, of every attention. Without `split` all kinds
    compete for every cut. With it they take turns, each for its share of what is to go: blocks, then channels,
    then heads, each up to the sum of the shares so far, so that what one overshoots the next one saves.

    `search: racing` scores the candidates that may win, by loss per unit saved, orders channels and heads by the
    error that their removal leaves, and lets what stays make up for it by least squares. Error and fit are over
    text that the original writes itself: one kind of text would not keep what others need, and a fit to the rows
    that are scored would flatter every cut.
    `search: exact` scores every candidate in every round by plain loss, also those that save far more than is left
    to save, and orders by weight magnitude: with `split` these are the decisions of MultiPruner's published code,
    norms of removed blocks counted as kept.
    Perplexity here weighs every token alike and in float32; the published code leaves out end-of-text tokens and
    rounds losses to the model's dtype.

    `of latency` measures, on the machine that compiles, what the branches of each kind take, and gives a step of a
    branch its share by parameters. That holds where time goes with size: in models of a few million parameters
    only whole branches save any, so `order: [blocks]`. Two compiles may decide differently; `expect` measures.

    Source: MultiPruner (Munoz et al. 2025, arXiv 2501.09949); text of its own: Self-calibration (Williams et al.
    2024, arXiv 2410.17170); racing, shared budget and repair: own.
    Example: slim = prune.multi(remove: 15% of params, score: perplexity(calib))
    """

    acts_on = "branches"
    makes = ("missing branches", "uneven widths")

    remove: Ratio = param(
        "Share of the parameters, their bytes, the operations per token or the latency that goes.",
        of=("params", "flops", "bytes", "latency"),
        gt=0,
        lt=1,
    )
    split: Shares | None = param(
        "How what goes is split between kinds that take turns; without it they compete.",
        of=("blocks", "channels", "heads"),
        default=None,
    )
    order: tuple[Literal["blocks", "channels", "heads"], ...] = param(
        "The kinds that may be cut, and with `split` whose turn comes when.",
        default=("blocks", "channels", "heads"),
        distinct=True,
    )
    reorder: Literal["l1", "wanda", "obs"] | None = param(
        "Which channels and heads of a module go first: by weights, by weights and inputs, or by the error left "
        "after repair; l1 in an exact search, else obs.",
        default=None,
    )
    group: int = param("Channels per cut.", default=64, ge=1, unit="channels")
    heads: int = param("KV heads per cut.", default=1, ge=1, unit="KV heads")
    width_score: MetricRef | None = param("What channels and heads are scored by, if not by `score`.", default=None)
    machine: ProfileRef | None = param(
        "The machine whose latency counts: the compile runs there, with the profile's threads.", default=None
    )
    check: MetricRef | None = param(
        "The same on other rows, measured now and then: what grows faster there was fitted to the score's rows.",
        default=None,
    )
    on: Selector | None = param("Which attention and MLP modules may be cut.", default=None)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.split is None:
            yield Unread(("width_score",), "`split`", ())

    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        if self.machine is not None and self.remove.of != "latency":
            raise no_clock(
                f"`machine` is whose latency is saved, and {self.remove.of} are the same on all",
                help="write `of latency`, or leave `machine` out",
            ).rejection()
        exact = self.exact
        return GreedySearch(
            Amount(self.remove, removes=True),
            "params",
            0,
            select_parts(skeleton, self.on, self.order, {"group": self.group, "heads": self.heads}),
            self.score,
            exact,
            rank=self.rank or ("loss" if exact else "ratio"),
            order=self.order,
            split=self.split,
            norms=not exact,
            widths=self.width_score,
            check=self.check,
            clock=self.clock,
            estimate=self.estimate,
            together=self.together,
            overshoots=self.overshoot or exact,
            fit=self.fit_settings(self.reorder or ("l1" if exact else "obs")),
        )

    def reads_clock(self) -> bool:
        return self.remove.of == "latency"
