"""Ranking of a group's items, and compensation for the removed ones: from weights alone, or from activations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ....dsl.checker.skeleton import Group
from ....dsl.checker.values import DataRef, MetricRef
from ...core.device import memory_budget_bytes_on
from . import importance
from .reconstruct import Moments, Reconstruction, has_moments, module_of, readers
from .routing import sum_router_weights

if TYPE_CHECKING:
    from ...ir.program import Program
    from ...plugin.context import Context
    from .loop import Search
    from .parts import Parts

Important = Callable[[Group], torch.Tensor]


@dataclass(frozen=True)
class FitSettings:
    """order   of a group's items: by weights, by weights and inputs, or by the error left after repair
    repair  whether what reads the items that go is refitted
    data    rows for both, and for routers; None: those of the model's own
    """

    order: Literal["l1", "wanda", "obs"] = "obs"
    repair: bool = True
    data: DataRef | None = None

    def groups_with_observed_readers(self, parts: "Sequence[Parts]") -> list[Group]:
        """The groups whose readers' inputs are looked at."""

        def looked_at(kind: "Parts") -> bool:
            return kind.kind != "experts" and (kind.sliced or self.repair or self.order != "l1")

        return [g for kind in parts if looked_at(kind) for g in kind.groups if g.readers]


class GroupRanking:
    """Ranking for one search. Activations are those of the model before the first cut."""

    def __init__(self, program: "Program", ctx: "Context", search: "Search", score: MetricRef, fit: FitSettings):
        self.program, self.ctx, self.search, self.score, self.fit = program, ctx, search, score, fit
        self.moments = Moments(ctx.workdir / "moments")
        self.repair = Reconstruction(program, self.moments) if fit.repair else None

    def collect_and_store_moments(self, parts: "Sequence[Parts]") -> None:
        """Moments over the data's rows, or over what the model writes."""
        model, groups = self.program.model, self.fit.groups_with_observed_readers(parts)
        modules = [module_of(m) for g in groups for m in readers(g) if has_moments(model, m)]
        if modules:
            settings = self.ctx.settings
            max_bytes = memory_budget_bytes_on(settings.device, settings.max_memory)
            self.search.collect_and_store_moments(self.moments, modules, self.score, self.fit.data, max_bytes)

    def item_importance(self, group: Group) -> torch.Tensor:
        """[count] float64, larger for items that matter more."""
        if self.fit.order == "l1":
            return importance.l1_importance(self.program, group)
        return (importance.obs_importance if self.fit.order == "obs" else importance.wanda_importance)(
            self.program, group, self.moments
        )

    def obs_importance(self, group: Group) -> torch.Tensor:
        """Ranking by the error that readers are left with; of items that only a scan reads, by weights."""
        return importance.obs_importance(self.program, group, self.moments)

    def make_expert_importance(self, groups: Sequence[Group]) -> Important:
        """Importance of experts: by routing weights on data, or by their weights."""
        known = sum_router_weights(self.program, self.ctx, self.fit.data, groups) if self.fit.data else {}
        return lambda group: known[group.site] if group.site in known else importance.l1_importance(self.program, group)
