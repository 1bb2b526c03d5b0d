"""Shed blocks, scans, channels, heads and states of a hybrid, whatever the model misses least."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ...compiler.ir.program import Program
from ...compiler.planning.amount import Amount
from ...compiler.planning.select import branches, competing
from ...compiler.search.branches import Branches
from ...compiler.search.candidate import Pool
from ...compiler.search.estimate import thinned
from ...compiler.search.goals import budget, reach, refuse_unreached, turns
from ...compiler.search.latency import latency_of
from ...compiler.search.loop import CUTS, Budget, Search
from ...compiler.search.mixers import ranking
from ...compiler.search.ordering import choice_of, ordering
from ...compiler.search.routing import least_experts, magnitude, trusted
from ...compiler.search.saving import OF_MODEL, Ledger
from ...compiler.search.scans import Scans
from ...compiler.search.slices import Slices
from ...compiler.search.widths import Widths
from ...compiler.words.context import Context
from ...compiler.words.kinds import Lossy, Pass, param
from ...dsl.diagnostics import Fault, Reject
from ...dsl.skeleton import Group, Scan, Skeleton
from ...dsl.values import DataRef, MetricRef, Ratio, Selector, Shares

nothing_to_shed = Fault("nothing-to-shed", "None of the kinds of parts that a search may cut is in the model.")

_MIXER = {"scan_heads": "ssm_heads", "scan_channels": "ssm_channels", "states": "ssm_state"}


class Multi(Pass):
    """Shed blocks, scans, channels, heads and states of a hybrid, whatever the model misses least.

    Candidates are every residual branch (Mamba block, attention, MLP, experts), every scan, the least important
    `group` channels of every MLP, the least important KV heads of every attention, the expert of every layer that its
    router trusts least on `data` (without data the one of least weights), and heads, channels and states of every
    mixer. All kinds compete for every cut, by loss per unit of what is to go; with `split` they take turns in
    the order of `order`, each for its share. `remove: 30` makes thirty cuts, whatever they save, and then plain loss
    decides: the step counts of Mamba-Shedder. What a block has lost inside no longer counts when it goes itself.

    `of latency` measures, on the machine that compiles, what all scans and all branches of each role take, and gives
    a step inside of one its share by parameters. Kinds that the model doesn't have are passed over.

    Source: Mamba-Shedder (Munoz et al. 2025, arXiv 2501.17088), section 3, whose Zamba2 stages are `order: [blocks,
    channels, scans]` with `split` and `search: exact`; one loop over all kinds and budgets of the model: own.
    Example: shed = shed.multi(remove: 15% of params, score: perplexity(calib))
    """

    keeps = Lossy()
    acts_on = "branches"
    makes = {"": "missing branches", "score": "uneven widths"}
    determinism = "deterministic"

    remove: int | Ratio = param("Share of the parameters, their bytes, the operations per token or the latency that "
                                "goes; a number counts cuts.", of=("params", "flops", "bytes", "latency"), gt=0,
                                unit="cuts")
    score: MetricRef = param("What the model is scored by without each candidate.")
    order: tuple[Literal["blocks", "scans", "channels", "heads", "experts", "scan_heads", "scan_channels", "states"],
                 ...] = param(
        "The kinds that may be cut, and with `split` whose turn comes when.",
        default=("blocks", "scans", "channels", "heads", "experts", "scan_heads", "scan_channels", "states"))
    split: Shares | None = param(
        "How what goes is split between kinds that take turns; without it they compete.",
        of=("blocks", "scans", "channels", "heads", "experts", "scan_heads", "scan_channels", "states"), default=None)
    search: Literal["racing", "exact"] = param("Score what may win, or everything.", default="racing")
    rank: Literal["ratio", "loss"] | None = param(
        "By loss per unit saved, or by plain loss; cuts are counted by plain loss.", default=None)
    repair: bool | None = param("Refit what reads MLP channels and KV heads that go; no in an exact search, else yes.",
                                default=None)
    group: int = param("Channels per cut, of MLPs and of Mamba-1 mixers.", default=64, ge=1, unit="channels")
    heads: int = param("KV heads, or heads of every group of a scan, per cut.", default=1, ge=1, unit="heads")
    experts: int = param("Experts of a layer per cut; as many stay as are chosen for a token.", default=1, ge=1,
                         unit="experts")
    states: int = param("States of every group of a scan per cut.", default=4, ge=1, unit="states")
    data: DataRef | None = param(
        "Rows that rank items and refit readers; unless given, 32 that the model itself writes.", default=None)
    clock: MetricRef = param("Which latency, measured on the machine that compiles.",
                             default=MetricRef("decode.p50"))
    on: Selector | None = param("Which blocks may be cut, whole or inside.", default=None)

    def run(self, program: Program, ctx: Context) -> None:
        self._refuse_absent(program.skeleton)
        search = Search(program, ctx)
        latency = self._latency(program, search)
        goal = self._goal(program.skeleton, latency and latency.total)
        ledger = Ledger(program.skeleton, latency=latency)
        if goal.of != CUTS:
            refuse_unreached(self._reach(ledger, goal.of), goal)
        pools = self._pools(program, ctx, search, ledger)
        choice = choice_of(self.search, goal.of if self._by_ratio(goal) else "")
        for kinds, share in turns(self.order, self.split):
            turn = Budget(goal.of, share * goal.goal, goal.total)
            search.run([pools[kind] for kind in kinds if kind in pools], self.score, turn, choice)
        refuse_unreached(search.saved.get(goal.of, 0.0), goal)
        search.finish(list(pools.values()))

    def _by_ratio(self, goal: Budget) -> bool:
        return goal.of != CUTS and (self.rank or ("loss" if self.search == "exact" else "ratio")) == "ratio"

    def _goal(self, skeleton: Skeleton, latency: float | None) -> Budget:
        if isinstance(self.remove, int):
            return Budget(CUTS, self.remove, self.remove)
        return budget(skeleton, Amount(self.remove, removes=True), "params", latency)

    def _latency(self, program: Program, search: Search):
        if isinstance(self.remove, int) or self.remove.of != "latency":
            return None
        return latency_of(program, search, self.clock)

    def _pools(self, program: Program, ctx: Context, search: Search, ledger: Ledger) -> dict[str, Pool]:
        skeleton, repair = program.skeleton, self.search != "exact" if self.repair is None else self.repair
        inside = {kind: self._groups(skeleton, kind) for kind in self.order}
        important, fixed = ordering(program, ctx, search, [*inside.get("channels", ()), *inside.get("heads", ())],
                                    self.score, "obs" if repair else "l1", repair, self.data)
        mixed = [g for kind in _MIXER for g in inside.get(kind, ())]
        ranked = ranking(program, ctx, search, mixed, self.score, self.data)[0] if mixed else None
        pools: dict[str, Pool] = {}
        for kind in self.order:
            if kind == "blocks":
                pools[kind] = Branches(program, branches(skeleton, self.on), ledger)
            elif kind == "scans":
                pools[kind] = Scans(program, self._scans(skeleton), ledger)
            elif inside[kind] and kind == "experts":
                pools[kind] = Slices(program, inside[kind], self.experts, ledger, self._trusted(program, ctx), kind,
                                     least_experts(skeleton))
            elif inside[kind] and kind in _MIXER:
                pools[kind] = Slices(program, inside[kind], self._step(kind), ledger, ranked, _MIXER[kind])
            elif inside[kind]:
                pools[kind] = Widths(program, inside[kind], self._step(kind), ledger, important, fixed)
        return pools

    def _trusted(self, program: Program, ctx: Context) -> Callable[[Group], Tensor]:
        """How experts are ranked: by routing weights on data, or by their own."""
        chosen = self._groups(program.skeleton, "experts")
        known = trusted(program, ctx, self.data, chosen) if self.data else {}
        return lambda group: known[group.site] if group.site in known else magnitude(program, group)

    def _step(self, kind: str) -> int:
        steps = {"channels": self.group, "scan_channels": self.group, "states": self.states, "experts": self.experts}
        return steps.get(kind, self.heads)

    def _scans(self, skeleton: Skeleton) -> tuple[Scan, ...]:
        allowed = branches(skeleton, self.on)
        return tuple(s for s in skeleton.scans if any(s.site in b.parts for b in allowed))

    def _groups(self, skeleton: Skeleton, kind: str) -> tuple[Group, ...]:
        return competing(skeleton, self.on).get(_MIXER.get(kind, kind), ())

    def _reach(self, ledger: Ledger, of: str) -> float:
        """No less than what can be saved: what is inside of scans and beside them may overlap."""
        chosen = branches(ledger.skeleton, self.on) if "blocks" in self.order else ()
        sites = [(g, self._step(kind)) for kind in self.order if kind not in ("blocks", "scans")
                 for g in self._groups(ledger.skeleton, kind)]
        most = reach(ledger, of, chosen, sites, least_experts(ledger.skeleton))
        if "scans" in self.order and of in OF_MODEL:
            free = [s for s in self._scans(ledger.skeleton) if not any(s.site in b.parts for b in chosen)]
            most += sum(ledger.scan(s, of) for s in free)
        return most

    def _refuse_absent(self, skeleton: Skeleton) -> None:
        found = {"blocks": branches(skeleton, self.on), "scans": self._scans(skeleton)}
        if not any(found[kind] if kind in found else self._groups(skeleton, kind) for kind in self.order):
            raise Reject(nothing_to_shed(f"the model has none of {', '.join(self.order)}",
                                         help="name other kinds in `order`, or let it choose among all"))

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """As if MLP channels or heads of scans went evenly, and blocks where they don't suffice."""
        self._refuse_absent(skeleton)
        if isinstance(self.remove, int):
            return skeleton
        goal = self._foreseen(skeleton)
        if self.remove.of != "latency":
            refuse_unreached(self._reach(Ledger(skeleton), goal.of), goal)
        kind = next((k for k in ("channels", "scan_heads", "scan_channels") if k in self.order
                     and self._groups(skeleton, k)), None)
        return thinned(skeleton, goal, self._groups(skeleton, kind) if kind else (), self._step(kind or ""),
                       branches(skeleton, self.on) if "blocks" in self.order else ())

    def _foreseen(self, skeleton: Skeleton) -> Budget:
        """The budget; one of latency, which is measured later, as if time went with operations."""
        ratio = Ratio(self.remove.value, "flops") if self.remove.of == "latency" else self.remove
        return budget(skeleton, Amount(ratio, removes=True), "params")

    def reads_clock(self) -> bool:
        return isinstance(self.remove, Ratio) and self.remove.of == "latency"

    def forwards(self, skeleton: Skeleton) -> int:
        """All candidates per cut when exact, about six when racing."""
        first = len(skeleton.branches) + len(skeleton.scans) + len(skeleton.groups)
        if isinstance(self.remove, int):
            cuts = self.remove
        else:
            goal = self._foreseen(skeleton)
            size = goal.total / max(1, 2 * first)
            cuts = max(1, round(goal.goal / size))
        return cuts * first if self.search == "exact" else first + 6 * cuts
