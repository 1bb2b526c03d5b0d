"""Remove whole experts."""

from collections.abc import Iterator, Sequence

from ...compiler.editing.rehearsal import rehearse
from ...compiler.editing.rewrite import Rewriter
from ...compiler.ir.program import Program
from ...compiler.planning.amount import Amount
from ...compiler.planning.select import groups, required
from ...compiler.search import routing
from ...compiler.search.importance import ascending, l1
from ...compiler.search.narrowing import forecast
from ...compiler.search.saving import steps
from ...compiler.search.widths import Site, slice_all
from ...compiler.words.context import Context
from ...compiler.words.kinds import Effort, Lossy, Pass, param
from ...dsl.diagnostics import Fault, Reject
from ...dsl.skeleton import Group, Skeleton
from ...dsl.values import DataRef, Ratio, Selector

too_few_experts = Fault("too-few-experts", "A layer would keep fewer experts than its router chooses for every token.")


class Experts(Pass):
    """Remove whole experts.

    Every layer of experts keeps the same share, so the checkpoint stays a stock one. With data, those go that the
    router trusts least: the sum of the weights that it gave them over all tokens. Without, those of least weight
    magnitude. Their rows of the router go with them, so that it chooses among the others; what it gives the chosen
    ones is as the model makes it. `prune.channels` makes all experts of a layer narrower.

    Source: own; routing weights as a measure, Muzio et al. 2024, "SEER-MoE" (arXiv 2404.05089), section 3.
    Example: few = prune.experts(keep: 50% of experts)
    """

    keeps = Lossy()
    acts_on = "experts"
    determinism = "deterministic"

    keep: Ratio = param("Share of the experts that stays.", of=("experts",), gt=0, le=1)
    on: Selector | None = param("Which layers of experts.", default=None)
    data: DataRef | None = param("Rows on which the router's weights are summed.", default=None)

    def run(self, program: Program, ctx: Context) -> None:
        chosen = self._groups(program.skeleton)
        trusted = routing.trusted(program, ctx, self.data, chosen) if self.data else {}
        cuts = []
        for group in chosen:
            scores = trusted[group.site] if group.site in trusted else l1(program, group)
            site = Site(group, ascending(scores))
            gone = site.next(site.size - Amount(self.keep).kept(site.size))
            cuts += [(group, set(gone))] if gone else []
        rehearse(
            program,
            f"{1 - self.keep.value:.0%} of the experts",
            lambda trial: self._take(trial, cuts),
            remedy="make experts narrower instead: `prune.channels`",
        )
        with Rewriter(program) as rewrite:
            self._take(program, cuts, rewrite)

    def _take(self, program: Program, cuts: Sequence[tuple[Group, set[int]]], rewrite: Rewriter | None = None) -> None:
        rewrite = rewrite or Rewriter(program)
        slice_all(program, rewrite, cuts)
        for name, count in _said_above(program, [group for group, _ in cuts]):
            rewrite.set_attr(name, Amount(self.keep).kept(count))

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        return forecast(skeleton, self._groups(skeleton), Amount(self.keep), 1)

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        return Effort(ctx.rows(self.data).numel() if self.data else 0)

    def _groups(self, skeleton: Skeleton) -> tuple[Group, ...]:
        """The layers of experts; Reject where one would be left with fewer than are chosen for a token."""
        found = required(skeleton, "experts", groups(skeleton, "experts", self.on))
        least = skeleton.facts.get("active_experts") or 1
        for group in found:
            kept = Amount(self.keep).kept(steps(group)) * group.count // steps(group)
            if kept < least:
                raise Reject(
                    too_few_experts(
                        f"{group.site} would keep {kept} of {group.count} experts, and {least} are chosen for a token",
                        help=f"keep at least {least / group.count:.0%} of experts",
                    )
                )
        return found


def _said_above(program: Program, chosen: Sequence[Group]) -> Iterator[tuple[str, int]]:
    """Numbers of experts that modules around the layers state, where all layers lose the same."""
    every = [g for g in program.skeleton.groups if g.kind == "experts"]
    counts = {g.count for g in every}
    if len(counts) == 1 and len(chosen) == len(every):
        for path, module in program.model.named_modules():
            if all(g.site.startswith(f"{path}." if path else "") for g in every):
                yield from (
                    (f"{path}.{name}" if path else name, value)
                    for name, value in vars(module).items()
                    if type(value) is int and "expert" in name and value in counts
                )
