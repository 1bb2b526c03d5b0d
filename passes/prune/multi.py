"""Prune blocks, MLP channels and attention heads, whatever the model misses least."""

from collections.abc import Sequence
from typing import Literal

from ...compiler.ir.program import Program
from ...compiler.planning.amount import Amount
from ...compiler.planning.select import branches, competing
from ...compiler.search.beside import Beside
from ...compiler.search.branches import Branches
from ...compiler.search.candidate import Pool
from ...compiler.search.choice import Choice
from ...compiler.search.effort import of_fitting
from ...compiler.search.estimate import thinned
from ...compiler.search.goals import budget, reach, refuse_coarse, refuse_unreached, turns
from ...compiler.search.latency import Latency, latency_of, no_clock
from ...compiler.search.loop import Budget, Search
from ...compiler.search.ordering import Order, choice_of, ordering
from ...compiler.search.saving import Ledger
from ...compiler.search.widths import Widths
from ...compiler.words.context import Context
from ...compiler.words.kinds import Effort, Lossy, Pass, param
from ...dsl.diagnostics import Fault, Reject
from ...dsl.skeleton import Group, Skeleton
from ...dsl.values import DataRef, MetricRef, ProfileRef, Ratio, Selector, Shares

bad_turns = Fault("bad-turns", "The kinds that a search may cut, and what they are given, don't go together.")


class Multi(Pass):
    """Prune blocks, MLP channels and attention heads, whatever the model misses least.

    Candidates are every residual branch, the least important `group` channels of every MLP and the least
    important `heads` KV heads, with the query heads they serve, of every attention. Without `split` all kinds
    compete for every cut. With it they take turns, each for its share of what is to go: blocks, then channels,
    then heads, each up to the sum of the shares so far, so that what one overshoots the next one saves.

    `search: racing` scores the candidates that may win, by loss per unit saved, orders channels and heads by the
    error that their removal leaves, and lets what stays make up for it by least squares. Error and fit are over
    text that the original writes itself: one kind of text would not keep what others need, and a fit to the rows
    that are scored would flatter every cut.
    `search: exact` scores every candidate in every round by plain loss and orders by weight magnitude: with
    `split` these are the decisions of MultiPruner's published code, norms of removed blocks counted as kept.
    Perplexity here weighs every token alike and in float32; the published code leaves out end-of-text tokens and
    rounds losses to the model's dtype.

    `of latency` measures, on the machine that compiles, what the branches of each kind take, and gives a step of a
    branch its share by parameters. That holds where time goes with size: in models of a few million parameters
    only whole branches save any, so `order: [blocks]`. Two compiles may decide differently; `expect` measures.

    Source: MultiPruner (Munoz et al. 2025, arXiv 2501.09949); text of its own: Self-calibration (Williams et al.
    2024, arXiv 2410.17170); racing, shared budget and repair: own.
    Example: slim = prune.multi(remove: 15% of params, score: perplexity(calib))
    """

    keeps = Lossy()
    acts_on = "branches"
    makes = {"": "missing branches", "score": "uneven widths"}
    determinism = "deterministic"

    remove: Ratio = param("Share of the parameters, their bytes, the operations per token or the latency that goes.",
                          of=("params", "flops", "bytes", "latency"), gt=0, lt=1)
    score: MetricRef = param("What the model is scored by without each candidate.")
    split: Shares | None = param("How what goes is split between kinds that take turns; without it they compete.",
                                 of=("blocks", "channels", "heads"), default=None)
    order: tuple[Literal["blocks", "channels", "heads"], ...] = param(
        "The kinds that may be cut, and with `split` whose turn comes when.", default=("blocks", "channels", "heads"))
    search: Literal["racing", "exact"] = param("Score what may win, or everything.", default="racing")
    rank: Literal["ratio", "loss"] | None = param(
        "By loss per unit saved, or by plain loss; an exact search takes plain loss unless told.", default=None)
    reorder: Literal["l1", "wanda", "obs"] | None = param(
        "Which channels and heads of a module go first: by weights, by weights and inputs, or by the error left "
        "after repair; l1 in an exact search, else obs.", default=None)
    repair: bool | None = param("Refit what reads the channels that go; no in an exact search, else yes.", default=None)
    data: DataRef | None = param(
        "Rows that items are ranked and readers refitted on, several thousand tokens, not the score's; unless given, "
        "32 that the model itself writes.", default=None)
    group: int = param("Channels per cut.", default=64, ge=1, unit="channels")
    heads: int = param("KV heads per cut.", default=1, ge=1, unit="KV heads")
    width_score: MetricRef | None = param("What channels and heads are scored by, if not by `score`.", default=None)
    clock: MetricRef = param("Which latency, measured on the machine that compiles.",
                             default=MetricRef("decode.p50"))
    machine: ProfileRef | None = param(
        "The machine whose latency counts: the compile runs there, with the profile's threads.", default=None)
    check: MetricRef | None = param(
        "The same on other rows, measured now and then: what grows faster there was fitted to the score's rows.",
        default=None)
    on: Selector | None = param("Which attention and MLP modules may be cut.", default=None)

    def run(self, program: Program, ctx: Context) -> None:
        ordered = self._turns()
        search = Search(program, ctx)
        latency = self._latency(program, search)
        goal = budget(program.skeleton, Amount(self.remove, removes=True), "params", latency and latency.total)
        ledger = Ledger(program.skeleton, norms=self.search != "exact", latency=latency)
        refuse_unreached(self._reach(ledger, goal.of), goal)
        pools = self._pools(program, ctx, search, ledger)
        choice = self._choice(goal)
        search.beside = self.check and Beside(self.check, goal.goal)
        for kinds, share in ordered:
            turn = Budget(goal.of, share * goal.goal, goal.total)
            score = self.score if "blocks" in kinds or self.width_score is None else self.width_score
            search.run([pools[kind] for kind in kinds], score, turn, choice)
        refuse_unreached(search.saved.get(goal.of, 0.0), goal)
        search.finish(list(pools.values()))

    def _turns(self) -> list[tuple[Sequence[str], float]]:
        """(kinds that compete, share of what is to go that must have gone when their turn ends)."""
        if self.machine is not None and self.remove.of != "latency":
            raise Reject(no_clock(f"`machine` is whose latency is saved, and {self.remove.of} are the same on all",
                                  help="write `of latency`, or leave `machine` out"))
        order = tuple(dict.fromkeys(self.order))
        if self.split is None:
            if self.width_score is not None:
                raise Reject(bad_turns("`width_score` is for kinds that take turns, and all compete by one score",
                                       help="add `split`, or leave `width_score` out"))
            return [(order, 1.0)]
        whole = sum(self.split.share(kind) for kind in order)
        if whole <= 0:
            raise Reject(bad_turns(f"`split` gives {', '.join(order) or 'no kind of `order`'} nothing",
                                   help="name kinds in `order` that `split` gives a share"))
        return turns(order, self.split)

    def _reach(self, ledger: Ledger, of: str) -> float:
        chosen = self._narrowed(ledger.skeleton)
        steps = {"channels": self.group, "heads": self.heads}
        for kind, parameter in (("channels", "group"), ("heads", "heads")):
            if kind in self.order:
                refuse_coarse(parameter, steps[kind], chosen[kind])
        sites = [(g, steps[kind]) for kind in steps if kind in self.order for g in chosen[kind]]
        return reach(ledger, of, branches(ledger.skeleton, self.on) if "blocks" in self.order else (), sites)

    def _choice(self, goal: Budget) -> Choice:
        rank = self.rank or ("loss" if self.search == "exact" else "ratio")
        per = goal.of if rank == "ratio" else ""
        return choice_of(self.search, per)

    def _fit(self) -> tuple[Order, bool]:
        """How items are ranked, and whether readers are refitted."""
        exact = self.search == "exact"
        return self.reorder or ("l1" if exact else "obs"), not exact if self.repair is None else self.repair

    def _latency(self, program: Program, search: Search) -> Latency | None:
        if self.remove.of != "latency":
            return None
        return latency_of(program, search, self.clock)

    def _pools(self, program: Program, ctx: Context, search: Search, ledger: Ledger) -> dict[str, Pool]:
        skeleton = program.skeleton
        chosen = self._narrowed(skeleton)
        important, fixed = ordering(program, ctx, search, [*chosen["channels"], *chosen["heads"]],
                                    self.width_score or self.score, *self._fit(), self.data)
        pools = {
            "blocks": Branches(program, branches(skeleton, self.on), ledger),
            "channels": Widths(program, chosen["channels"], self.group, ledger, important, fixed),
            "heads": Widths(program, chosen["heads"], self.heads, ledger, important, fixed),
        }
        return {kind: pools[kind] for kind in self.order}

    def _narrowed(self, skeleton: Skeleton) -> dict[str, tuple[Group, ...]]:
        found = competing(skeleton, self.on)
        return {kind: found.get(kind, ()) for kind in ("channels", "heads")}

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """As if channels or heads went evenly, and blocks where they don't suffice: the search decides otherwise.

        Raises Reject where the budget can't be met; one of latency is known when it was measured.
        """
        self._turns()
        goal, chosen = self._foreseen(skeleton), self._narrowed(skeleton)
        if self.remove.of != "latency":
            refuse_unreached(self._reach(Ledger(skeleton, norms=self.search != "exact"), goal.of), goal)
        kind = next((k for k in ("channels", "heads") if k in self.order and chosen[k]), "channels")
        return thinned(skeleton, goal, chosen[kind] if kind in self.order else (),
                       self.group if kind == "channels" else self.heads,
                       branches(skeleton, self.on) if "blocks" in self.order else ())

    def reads_clock(self) -> bool:
        return self.remove.of == "latency"

    def _foreseen(self, skeleton: Skeleton) -> Budget:
        """The budget; one of latency, which is measured later, as if time went with operations."""
        ratio = Ratio(self.remove.value, "flops") if self.remove.of == "latency" else self.remove
        return budget(skeleton, Amount(ratio, removes=True), "params")

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        order, repair = self._fit()
        if order == "l1" and not repair:
            return Effort()
        chosen = self._narrowed(skeleton)
        return of_fitting(skeleton, ctx, [g for kind in chosen if kind in self.order for g in chosen[kind]], self.data)

    def forwards(self, skeleton: Skeleton) -> int:
        """Scores, taking channel steps as the unit: all candidates per cut when exact, about six when racing."""
        goal, ledger = self._foreseen(skeleton), Ledger(skeleton)
        sites = self._narrowed(skeleton)["channels"]
        step = max((self.group * ledger.of_step(g.site, g.kind, goal.of) for g in sites), default=goal.goal)
        first = len(skeleton.branches) * 2
        cuts = max(1, round(goal.goal / step)) if step else 1
        return cuts * first if self.search == "exact" else first + cuts * 6
