"""Fewer channels or heads per site: choose which go, try the choice with masks, then slice once.

Sizes here are in steps of a group: an item, or for query heads under grouped-query attention one item of every
KV head, since each KV head must serve the same number.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..dsl.skeleton import Group, Skeleton
from . import shrink
from .amount import Amount
from .greedy import Cut, Greedy
from .importance import ascending, l1
from .rewrite import Rewriter
from .trial import without_items

if TYPE_CHECKING:
    from .context import Context
    from .kinds import Metric
    from .program import Program


@dataclass
class Site:
    """One group while it is being cut; `order` has its items from the least to the most important."""

    group: Group
    order: list[int]
    dead: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        return steps(self.group)

    @property
    def left(self) -> int:
        return self.size - len(self.dead) * self.size // self.group.count

    def next(self, count: int) -> list[int]:
        """The items of the `count` least important steps that are left."""
        alive = [i for i in self.order if i not in self.dead]
        block = self.group.per_block or self.group.count
        by_block: dict[int, list[int]] = {}
        for item in alive:
            by_block.setdefault(item // block, []).append(item)
        return [item for b in sorted(by_block) for item in by_block[b][:count]]


def steps(group: Group) -> int:
    """How many steps a group has."""
    return group.per_block or group.count


def narrow_evenly(program: "Program", groups: Sequence[Group], amount: Amount, align: int) -> None:
    """Every group keeps the same share; the items of least weight magnitude go."""
    sites = _sites(program, groups)
    for site in sites:
        site.dead.update(site.next(site.size - amount.kept(site.size, align)))
    _slice(program, sites)


def narrow_greedily(program: "Program", groups: Sequence[Group], amount: Amount, align: int, metric: "Metric",
                    ctx: "Context") -> list[Cut[Site]]:
    """Cut `align` steps at a time where the score is hurt least, until the groups together keep the amount."""
    skeleton, sites = program.skeleton, _sites(program, groups)
    with ExitStack() as masks:
        def cut(site: Site) -> None:
            gone = site.next(align)
            site.dead.update(gone)
            masks.enter_context(without_items(program, site.group, gone))

        def score(site: Site) -> float:
            with without_items(program, site.group, site.next(align)):
                return metric.measure(program.model, ctx)

        enough = _goal(skeleton, sites, amount, align)
        cuts = Greedy(metric=metric, candidates=lambda: [s for s in sites if s.left > align],
                      label=lambda s: s.group.site, score=score, cut=cut, enough=enough).run(ctx)
    _slice(program, sites)
    return cuts


def forecast(skeleton: Skeleton, groups: Sequence[Group], amount: Amount, align: int) -> Skeleton:
    """The skeleton with every group narrowed by the same share: exact when even, an estimate when greedy."""
    if amount.of == "params":
        return _forecast_params(skeleton, groups, amount, align)
    for group in groups:
        kept = amount.kept(steps(group), align) * group.count // steps(group)
        skeleton = shrink.narrowed(skeleton, _again(skeleton, group), kept)
    return skeleton


def forwards(skeleton: Skeleton, groups: Sequence[Group], amount: Amount, align: int) -> int:
    """How many scores a greedy search takes: about one per site and cut."""
    after = {(g.site, g.kind): g.count for g in forecast(skeleton, groups, amount, align).groups}
    cuts = sum((g.count - after[g.site, g.kind]) * steps(g) // g.count // align for g in groups)
    return cuts * len(groups)


def _goal(skeleton: Skeleton, sites: Sequence[Site], amount: Amount, align: int):
    """Whether enough is cut: of the groups' steps together, or of the model's parameters."""
    if amount.of != "params":
        keep = amount.kept(sum(s.size for s in sites), align)
        return lambda: sum(s.left for s in sites) <= keep
    limit = amount.kept(shrink.params(skeleton))

    def enough() -> bool:
        now = skeleton
        for site in sites:
            if site.dead:
                now = shrink.narrowed(now, _again(now, site.group), site.group.count - len(site.dead))
        return shrink.params(now) <= limit

    return enough


def _forecast_params(skeleton: Skeleton, groups: Sequence[Group], amount: Amount, align: int) -> Skeleton:
    limit, kept = amount.kept(shrink.params(skeleton)), {g.site: steps(g) for g in groups}
    while shrink.params(skeleton) > limit and max(kept.values()) > align:
        group = max(groups, key=lambda g: kept[g.site])
        kept[group.site] -= align
        count = kept[group.site] * group.count // steps(group)
        skeleton = shrink.narrowed(skeleton, _again(skeleton, group), count)
    return skeleton


def _sites(program: "Program", groups: Sequence[Group]) -> list[Site]:
    return [Site(g, ascending(l1(program, g))) for g in groups]


def _again(skeleton: Skeleton, group: Group) -> Group:
    """The group as it is in a skeleton that may have been narrowed since."""
    return next(g for g in skeleton.groups if (g.site, g.kind) == (group.site, group.kind))


def _slice(program: "Program", sites: Sequence[Site]) -> None:
    """Take the dead items out of every tensor, and set the integers that follow."""
    with Rewriter(program) as rewrite:
        for site in sites:
            if not site.dead:
                continue
            group, left = site.group, site.group.count - len(site.dead)
            for member in group.members:
                dead = {i for item in site.dead for i in member.indices(item)}
                total = program.model.get_parameter(member.tensor).shape[member.axis]
                rewrite.narrow(member.tensor, member.axis, [i for i in range(total) if i not in dead])
            for module, name, per in group.attributes:
                rewrite.set_attr(f"{module}.{name}", round(left * per))
            program.note(site=group.site, kind=group.kind, removed=sorted(site.dead), kept=left)
