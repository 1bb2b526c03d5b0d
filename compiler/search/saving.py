"""What a cut saves: parameters, operations, blocks or items, by arithmetic on shapes."""

import math
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from ...dsl.skeleton import Branch, Group, Part, Scan, Skeleton
from ..planning import shrink
from ..planning.select import is_inside

if TYPE_CHECKING:
    from .latency import Latency

SCANS = "scans"
CONTEXT = 512          # positions that a decoded token attends to where operations are counted

OF_MODEL = {
    "params": shrink.params,
    "bytes": shrink.bytes_,
    "flops": lambda skeleton: shrink.flops_per_token(skeleton, CONTEXT),
}


def whole(skeleton: Skeleton, of: str) -> float:
    """How much of something a model has: what a ratio of a budget is a share of."""
    if of in OF_MODEL:
        return OF_MODEL[of](skeleton)
    if of == "blocks":
        return len(skeleton.branches)
    return sum(steps(g) for g in skeleton.groups if g.kind == of)


def steps(group: Group) -> int:
    """How many steps a group can be cut in: items, or for query heads under GQA one item of every KV head."""
    return group.per_block or group.count


class Ledger:
    """Savings of a search's candidates, and what has been cut inside of which branch.

    branch(site, of)            what a branch that may have been narrowed still has
    layer(unit, of)             what a whole layer has
    of_step(site, kind, of)     what one step of a group has

    norms   whether a branch's own norms count with it. MultiPruner's code counts them as kept until the end,
            so a search that repeats its decisions leaves them out.
    latency what the branches take on this machine, where a search saves "latency"; a step of a branch is given its
            share of the branch's parameters
    """

    def __init__(self, skeleton: Skeleton, norms: bool = True, latency: "Latency | None" = None):
        self.skeleton, self.norms, self.latency = skeleton, norms, latency
        self.now = skeleton            # narrower by what shares tensors with other groups, as in convolutional nets
        self.shared = _sharing(skeleton)
        self.lost: dict[tuple[str, str, str], float] = {}       # (site, kind, of) -> saved there by narrowing
        self.inside = {b.site: {(g.site, g.kind) for g in skeleton.groups if is_inside(g, b)}
                       for b in skeleton.branches}
        for b in skeleton.branches:
            self.inside[b.site] |= {(s.site, SCANS) for s in skeleton.scans if s.site in b.parts}
        self.of_branch = cache(self._of_branch)
        self.of_step = cache(self._of_step)
        self.layer = cache(self._layer)

    @property
    def counted(self) -> tuple[str, ...]:
        """What savings are kept of."""
        return (*OF_MODEL, *(("latency",) if self.latency else ()))

    def branch(self, site: str, of: str) -> float:
        """What a branch that may have been narrowed still has."""
        gone = sum(v for (place, kind, what), v in self.lost.items()
                   if what == of and (place, kind) in self.inside[site])
        return self.of_branch(site, of) - gone

    def scan(self, scan: Scan, of: str) -> float:
        """What a scan has, in the model as it was."""
        return OF_MODEL[of](self.skeleton) - OF_MODEL[of](shrink.without_scan(self.skeleton, scan))

    def narrowed(self, site: str, kind: str, count: int) -> None:
        """Note that `count` more steps of a group are gone."""
        self.lost_at(site, kind, {of: count * self.of_step(site, kind, of) for of in self.counted})
        if (site, kind) in self.shared:
            group = _group(self.now, site, kind)
            self.now = shrink.narrowed(self.now, group, group.count - count * group.count // steps(group))
            self.of_step.cache_clear()

    def lost_at(self, site: str, kind: str, saved: Mapping[str, float]) -> None:
        """Note what cuts that are real at once have saved of a part so far."""
        for of, value in saved.items():
            self.lost[site, kind, of] = self.lost.get((site, kind, of), 0.0) + value

    def _of_branch(self, site: str, of: str) -> float:
        branch = next(b for b in self.skeleton.branches if b.site == site)
        if of == "blocks":
            return 1
        if of == "latency":
            return self.latency.per_branch[branch.role]
        if of not in OF_MODEL:
            return 0
        if of == "params" and not self.norms:
            return float(_params_without_norms(self.skeleton, branch))
        return OF_MODEL[of](self.skeleton) - OF_MODEL[of](shrink.without_branch(self.skeleton, branch))

    def _layer(self, unit: str, of: str) -> float:
        if of == "blocks":
            return 1
        if of not in OF_MODEL:
            return 0
        return OF_MODEL[of](self.skeleton) - OF_MODEL[of](shrink.without_unit(self.skeleton, unit))

    def _of_step(self, site: str, kind: str, of: str) -> float:
        if of == kind:
            return 1
        if of == "latency":
            home = next((b for b, inside in self.inside.items() if (site, kind) in inside), None)
            if home is None:                   # no branch whose time it is a part of
                return 0.0
            return self.of_branch(home, of) * self.of_step(site, kind, "params") / self.of_branch(home, "params")
        if of not in OF_MODEL:
            return 0
        skeleton = self.now if (site, kind) in self.shared else self.skeleton
        group = _group(skeleton, site, kind)
        size = steps(group)
        if size == 1:
            return 0
        less = shrink.narrowed(skeleton, group, group.count - group.count // size)
        return OF_MODEL[of](skeleton) - OF_MODEL[of](less)


def _group(skeleton: Skeleton, site: str, kind: str) -> Group:
    return next(g for g in skeleton.groups if (g.site, g.kind) == (site, kind))


def _sharing(skeleton: Skeleton) -> set[tuple[str, str]]:
    """(site, kind) of the groups that cut a tensor which a group of another module cuts along another axis."""
    axes: dict[str, set[tuple[str, int]]] = {}
    for group in skeleton.groups:
        for member in group.members:
            axes.setdefault(member.tensor, set()).add((group.site, member.axis))
    crossed = {tensor for tensor, found in axes.items()
               if len({site for site, _ in found}) > 1 and len({axis for _, axis in found}) > 1}
    return {(g.site, g.kind) for g in skeleton.groups if any(m.tensor in crossed for m in g.members)}


def _params_without_norms(skeleton: Skeleton, branch: Branch) -> int:
    """Parameters of the module that does a branch's work; of several modules, of those that multiply matrices."""
    def counts(part: Part) -> bool:
        below = branch.site != branch.unit and f"{part.path}.".startswith(f"{branch.site}.")
        return below or any(len(shape) > 1 for _, shape in part.tensors)

    inside = [p for p in skeleton.parts if p.path in branch.parts and counts(p)]
    return sum(math.prod(shape) for p in inside for _, shape in p.tensors)
