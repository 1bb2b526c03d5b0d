"""Shed blocks, scans, channels, heads and states of a hybrid, whatever the model misses least."""

from typing import Literal

from ...compiler.analysis.planning.amount import Amount
from ...compiler.plugin.interfaces import param
from ...compiler.transforms.search.budget import CUTS
from ...compiler.transforms.search.competing_pruner import CompetingPruner
from ...compiler.transforms.search.greedy import GreedySearch
from ...compiler.transforms.search.parts import select_parts
from ...compiler.transforms.search.routing import min_expert_count
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import Ratio, Selector, Shares
from ...dsl.syntax.diagnostics import Fault

nothing_to_shed = Fault("nothing-to-shed", "None of the kinds of parts that a search may cut is in the model.")


class Multi(CompetingPruner):
    """Shed blocks, scans, channels, heads and states of a hybrid, whatever the model misses least.

    Candidates are every residual branch (Mamba block, attention, MLP, experts), every scan, the least important
    `group` channels of every MLP, the least important KV heads of every attention, the expert of every layer that its
    router trusts least on `data` (without data the one of least weights), and heads, channels and states of every
    mixer. All kinds compete for every cut, by loss per unit of what is to go; with `split` they take turns in
    the order of `order`, each for its share. `remove: 30` makes thirty cuts, whatever they save, and then plain loss
    decides: the step counts of Mamba-Shedder. What a block has lost inside no longer counts when it goes itself.

    `of latency` measures, on the machine that compiles, what all scans and all branches of each role take, and gives
    a step inside of one its share by parameters. Kinds that the model doesn't have are passed over.
    A block that several layers share (Zamba2's) stays shared; where some of them lose it, only `effc.load` opens the
    result.

    Source: Mamba-Shedder (Munoz et al. 2025, arXiv 2501.17088), section 3, whose Zamba2 stages are `order: [blocks,
    channels, scans]` with `split` and `search: exact`; one loop over all kinds and budgets of the model: own.
    Example: shed = shed.multi(remove: 15% of params, score: perplexity(calib))
    """

    acts_on = "branches"
    makes = ("missing branches", "uneven widths")

    remove: int | Ratio = param(
        "Share of the parameters, their bytes, the operations per token or the latency that "
        "goes; a number counts cuts.",
        of=("params", "flops", "bytes", "latency"),
        gt=0,
        unit="cuts",
    )
    order: tuple[
        Literal["blocks", "scans", "channels", "heads", "experts", "scan_heads", "scan_channels", "states"], ...
    ] = param(
        "The kinds that may be cut, and with `split` whose turn comes when.",
        default=("blocks", "scans", "channels", "heads", "experts", "scan_heads", "scan_channels", "states"),
    )
    split: Shares | None = param(
        "How what goes is split between kinds that take turns; without it they compete.",
        of=("blocks", "scans", "channels", "heads", "experts", "scan_heads", "scan_channels", "states"),
        default=None,
    )
    rank: Literal["ratio", "loss"] | None = param(
        "By loss per unit saved, or by plain loss; cuts are counted by plain loss.", default=None
    )
    group: int = param("Channels per cut, of MLPs and of Mamba-1 mixers.", default=64, ge=1, unit="channels")
    heads: int = param("KV heads, or heads of every group of a scan, per cut.", default=1, ge=1, unit="heads")
    experts: int = param(
        "Experts of a layer per cut; as many stay as are chosen for a token.", default=1, ge=1, unit="experts"
    )
    states: int = param("States of every group of a scan per cut.", default=4, ge=1, unit="states")
    on: Selector | None = param("Which blocks may be cut, whole or inside.", default=None)

    def make_search(self, skeleton: Skeleton) -> GreedySearch:
        sizes = {"group": self.group, "heads": self.heads, "experts": self.experts, "states": self.states}
        parts = select_parts(skeleton, self.on, self.order, sizes, min_expert_count(skeleton))
        if not parts:
            raise nothing_to_shed(
                f"the model has none of {', '.join(self.order)}",
                help="name other kinds in `order`, or let it choose among all",
            ).rejection()
        exact = self.exact
        return GreedySearch(
            Amount(self.remove, removes=True),
            CUTS,
            0,
            parts,
            self.score,
            exact,
            rank=self.rank or ("loss" if exact else "ratio"),
            order=self.order,
            split=self.split,
            clock=self.clock,
            estimate=self.estimate,
            together=self.together,
            overshoots=self.overshoot or self.exact,
            fit=self.fit_settings(),
        )

    def reads_clock(self) -> bool:
        return isinstance(self.remove, Ratio) and self.remove.of == "latency"
