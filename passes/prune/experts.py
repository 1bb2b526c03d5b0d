"""Remove whole experts."""

from collections.abc import Sequence

from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.planning.amount import Amount
from ...compiler.analysis.planning.cost import token_or_image_count
from ...compiler.analysis.planning.selection import groups, reject_if_model_has_none
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Effort, Lossy, Pass, param
from ...compiler.transforms.editing.dry_run import dry_run_or_reject
from ...compiler.transforms.editing.rewrite import Rewriter
from ...compiler.transforms.search import routing
from ...compiler.transforms.search.importance import ascending_indices, l1_importance
from ...compiler.transforms.search.savings import step_count_of
from ...compiler.transforms.search.uniform_widths import forecast_even_widths
from ...compiler.transforms.search.widths import RankedGroup, slice_groups
from ...dsl.checker.skeleton import Group, Skeleton
from ...dsl.checker.values import DataRef, Ratio, Selector


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
    changes = ("weights",)
    determinism = "deterministic"

    keep: Ratio = param("Share of the experts that stays.", of=("experts",), gt=0, le=1)
    on: Selector | None = param("Which layers of experts.", default=None)
    data: DataRef | None = param("Rows on which the router's weights are summed.", default=None)

    def run(self, program: Program, ctx: Context) -> None:
        chosen = self._expert_groups_or_reject(skeleton_of(program))
        trusted = routing.sum_router_weights(program, ctx, self.data, chosen) if self.data else {}
        cuts = []
        for group in chosen:
            scores = trusted[group.site] if group.site in trusted else l1_importance(program, group)
            site = RankedGroup(group, ascending_indices(scores))
            removed = site.least_important_per_block(site.size - Amount(self.keep).remaining_count(site.size))
            cuts += [(group, set(removed))] if removed else []
        dry_run_or_reject(
            program,
            f"{1 - self.keep.value:.0%} of the experts",
            lambda trial: self._remove_items_and_set_counts(trial, cuts),
            remedy="make experts narrower instead: `prune.channels`",
        )
        with Rewriter(program) as rewrite:
            self._remove_items_and_set_counts(program, cuts, rewrite)

    def _remove_items_and_set_counts(
        self,
        program: Program,
        groups_and_removed_items: Sequence[tuple[Group, set[int]]],
        rewriter: Rewriter | None = None,
    ) -> None:
        rewriter = rewriter or Rewriter(program)
        slice_groups(program, rewriter, groups_and_removed_items)
        expert_groups = [g for g in skeleton_of(program).groups if g.kind == "experts"]
        for name, count in routing.expert_count_attributes(
            program, [group for group, _ in groups_and_removed_items], expert_groups
        ):
            rewriter.set_attr(name, Amount(self.keep).remaining_count(count))

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        return forecast_even_widths(skeleton, self._expert_groups_or_reject(skeleton), Amount(self.keep), 1)

    def effort(self, skeleton: Skeleton, ctx: Context) -> Effort:
        return Effort(token_or_image_count(ctx.rows(self.data)) if self.data else 0)

    def _expert_groups_or_reject(self, skeleton: Skeleton) -> tuple[Group, ...]:
        """The layers of experts; Reject where one would be left with fewer than are chosen for a token."""
        expert_groups = reject_if_model_has_none(skeleton, "experts", groups(skeleton, "experts", self.on))
        for group in expert_groups:
            remaining = Amount(self.keep).remaining_count(step_count_of(group)) * group.count // step_count_of(group)
            routing.refuse_too_few_experts(skeleton, group, remaining, "keep")
        return expert_groups
