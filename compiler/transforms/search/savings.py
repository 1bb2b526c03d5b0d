"""Savings of a cut: parameters, operations, blocks or items, by arithmetic on shapes."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from ....dsl.checker.skeleton import Branch, Group, Part, Scan, Skeleton
from ...analysis.planning import shrink
from ...analysis.planning.selection import is_group_inside_branch

if TYPE_CHECKING:
    from .latency import Latency

Key = tuple[str, str]  # site and kind of a group
RemovedSteps = tuple[tuple[Key, int], ...]  # groups, and how many of their steps are gone

SCANS = "scans"
CONTEXT = 512  # positions that a decoded token attends to where operations are counted

OF_MODEL = {
    "params": shrink.param_count,
    "bytes": shrink.param_bytes,
    "flops": lambda skeleton: shrink.flops_per_token(skeleton, CONTEXT),
}


def model_total(skeleton: Skeleton, quantity: str) -> float:
    """Total of a quantity in a model, of which a budget's ratio is a share."""
    if quantity in OF_MODEL:
        return OF_MODEL[quantity](skeleton)
    if quantity == "blocks":
        return len(skeleton.branches)
    return sum(step_count_of(g) for g in skeleton.groups if g.kind == quantity)


def step_count_of(group: Group) -> int:
    """Number of steps of a group: items, or for query heads under GQA one item of every KV head."""
    return group.per_block or group.count


def steps_per_cut(group: Group, requested_step: int) -> int:
    """Number of steps that a group loses at a time for a `requested_step`: a multiple of those it is computed in."""
    return math.lcm(requested_step, group.multiple)


class SavingsTable:
    """Savings of a search's candidates, and what has been cut inside of which branch.

    branch_savings(site, of)        what a branch that may have been narrowed still has
    layer_savings(unit, of)         what a whole layer has
    savings_per_step(site, kind, of)  what one step of a group has
    step_savings(site, kind, n, of) what its next n steps have, after what is gone: of chained convolutions a step has
                                    less where a neighbour was narrowed, since both are sides of one tensor
    note_dropped_branch(site)       note that a branch is gone: a group that spans more than it has less

    norms   whether a branch's own norms count with it. MultiPruner's code counts them as kept until the end,
            so a search that repeats its decisions leaves them out.
    latency what the branches take on this machine, where a search saves "latency"; a step of a branch is given its
            share of the branch's parameters
    """

    def __init__(self, skeleton: Skeleton, norms: bool = True, latency: "Latency | None" = None):
        self.skeleton, self.norms, self.latency = skeleton, norms, latency
        self.removed: dict[tuple[str, str, str], float] = {}  # (site, kind, of) -> saved there by narrowing
        self.removed_steps: dict[tuple[str, str], int] = {}  # (site, kind) -> steps that are gone
        self.crossing = _groups_across_same_tensor(skeleton)
        self.partly = {b.site: _groups_partly_in_branch(skeleton, b) for b in skeleton.branches}
        self.missing: tuple[str, ...] = ()  # branches that are gone and held a part of groups that stay
        self.inside: dict[str, set[tuple[str, str]]] = {
            b.site: {(g.site, g.kind) for g in skeleton.groups if is_group_inside_branch(g, b)}
            for b in skeleton.branches
        }
        for b in skeleton.branches:
            self.inside[b.site] |= {(s.site, SCANS) for s in skeleton.scans if s.site in b.parts}
        self.original_branch_savings = cache(self._of_branch)
        self.savings_per_step = cache(self._savings_per_step)
        self.layer_savings = cache(self._layer)
        self._crossed = cache(self._savings_from_dropping_steps)

    @property
    def budget_kinds(self) -> tuple[str, ...]:
        """Quantities that savings are recorded for."""
        return (*OF_MODEL, *(("latency",) if self.latency else ()))

    def branch_savings(self, site: str, quantity: str) -> float:
        """Remaining amount of a branch that may have been narrowed."""
        around = self.partly[site] & self.removed_steps.keys()
        kin = (
            tuple((key, self.removed_steps[key]) for key in self.removed_steps if key in self.inside[site] | around)
            if around
            else ()
        )
        narrowed = {key for key, _ in kin}
        removed = sum(
            v
            for (group_site, kind, unit), v in self.removed.items()
            if unit == quantity and (group_site, kind) in self.inside[site] and (group_site, kind) not in narrowed
        )
        return (
            self._remaining_branch_amount(site, quantity, kin) if kin else self.original_branch_savings(site, quantity)
        ) - removed

    def note_dropped_branch(self, site: str) -> None:
        """Note that a branch is gone."""
        if self.partly[site]:
            self.missing = (*self.missing, site)

    def scan_savings(self, scan: Scan, quantity: str) -> float:
        """Amount of a scan in the original model."""
        return OF_MODEL[quantity](self.skeleton) - OF_MODEL[quantity](shrink.without_scan(self.skeleton, scan))

    def step_savings(self, site: str, kind: str, step_count: int, quantity: str) -> float:
        """Savings of the next `step_count` steps of a group, after earlier cuts."""
        missing = tuple(b for b in self.missing if (site, kind) in self.partly[b])
        if quantity not in OF_MODEL or ((site, kind) not in self.crossing and not missing):
            return step_count * self.savings_per_step(site, kind, quantity)
        kin = tuple(
            (one, self.removed_steps[one]) for one in self.crossing.get((site, kind), ()) if self.removed_steps.get(one)
        )
        return self._crossed((site, kind), step_count, quantity, kin, missing)

    def _savings_from_dropping_steps(
        self,
        group_key: Key,
        step_count: int,
        quantity: str,
        removed_steps: RemovedSteps,
        missing_sites: tuple[str, ...],
    ) -> float:
        left = _skeleton_without_steps(self.skeleton, removed_steps)
        skeletons = (_without(side, missing_sites) for side in (left, with_fewer_steps(left, group_key, step_count)))
        before, after = (OF_MODEL[quantity](side) for side in skeletons)
        return before - after

    def note_narrowed_group(self, site: str, kind: str, step_count: int) -> None:
        """Note that the next `step_count` steps of a group are gone."""
        self.note_saved(site, kind, {of: self.step_savings(site, kind, step_count, of) for of in self.budget_kinds})
        self.removed_steps[site, kind] = self.removed_steps.get((site, kind), 0) + step_count

    def note_saved(self, site: str, kind: str, saved: Mapping[str, float]) -> None:
        """Note what cuts that are real at once have saved of a part so far."""
        for of, value in saved.items():
            self.removed[site, kind, of] = self.removed.get((site, kind, of), 0.0) + value

    def _of_branch(self, path: str, quantity: str) -> float:
        return self._remaining_branch_amount(path, quantity, ())

    def _remaining_branch_amount(self, site: str, quantity: str, removed_steps: RemovedSteps) -> float:
        """Amount of a branch whose groups have lost so many steps."""
        branch = next(b for b in self.skeleton.branches if b.site == site)
        if quantity == "blocks":
            return 1
        if quantity == "latency":
            return self.latency.per_branch[branch.role]
        if quantity not in OF_MODEL:
            return 0
        skeleton = _skeleton_without_steps(self.skeleton, removed_steps)
        if quantity == "params" and not self.norms:
            return float(_branch_params_without_norms(skeleton, branch))
        return OF_MODEL[quantity](skeleton) - OF_MODEL[quantity](shrink.without_branch(skeleton, branch))

    def _layer(self, unit: str, quantity: str) -> float:
        if quantity == "blocks":
            return 1
        if quantity not in OF_MODEL:
            return 0
        return OF_MODEL[quantity](self.skeleton) - OF_MODEL[quantity](shrink.without_unit(self.skeleton, unit))

    def _savings_per_step(self, site: str, kind: str, quantity: str) -> float:
        group = next(g for g in self.skeleton.groups if (g.site, g.kind) == (site, kind))
        if quantity == kind:
            return 1
        if quantity == "latency":
            home = next((b for b, inside in self.inside.items() if (site, kind) in inside), None)
            if home is None:  # no branch whose time it is a part of
                return 0.0
            return (
                self.original_branch_savings(home, quantity)
                * self.savings_per_step(site, kind, "params")
                / self.original_branch_savings(home, "params")
            )
        if quantity not in OF_MODEL:
            return 0
        size = step_count_of(group)
        if size == 1:
            return 0
        less = shrink.with_narrowed_group(self.skeleton, group, group.count - group.count // size)
        return OF_MODEL[quantity](self.skeleton) - OF_MODEL[quantity](less)


def _groups_partly_in_branch(skeleton: Skeleton, branch: Branch) -> frozenset[Key]:
    """Groups that have some of their tensors in a branch and others outside of it."""
    membership = ((g, [m.tensor.rpartition(".")[0] in branch.parts for m in g.members]) for g in skeleton.groups)
    return frozenset((g.site, g.kind) for g, inside in membership if any(inside) and not all(inside))


def _groups_across_same_tensor(skeleton: Skeleton) -> dict[tuple[str, str], tuple[tuple[str, str], ...]]:
    """Groups whose steps save less as others are narrowed, with those: they are two sides of one tensor.

    A group that is both sides itself is among its own.
    """
    by_tensor: dict[str, list[tuple[int, tuple[str, str]]]] = {}
    for group in skeleton.groups:
        for member in group.members:
            by_tensor.setdefault(member.tensor, []).append((member.axis, (group.site, group.kind)))
    crossed: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
    for pairs in by_tensor.values():
        for axis, key in pairs:
            for other in (other for side, other in pairs if side != axis):
                crossed.setdefault(key, {})[other] = None
    return {key: tuple(partners) for key, partners in crossed.items()}


def _skeleton_without_steps(skeleton: Skeleton, removed_steps: RemovedSteps) -> Skeleton:
    """The skeleton when groups have lost so many steps each."""
    for key, count in removed_steps:
        skeleton = with_fewer_steps(skeleton, key, count)
    return skeleton


def _without(skeleton: Skeleton, sites: Sequence[str]) -> Skeleton:
    for site in sites:
        skeleton = shrink.without_branch(skeleton, next(b for b in skeleton.branches if b.site == site))
    return skeleton


def with_fewer_steps(skeleton: Skeleton, group_key: tuple[str, str], step_count: int) -> Skeleton:
    """The skeleton when a group has lost `step_count` more of its steps."""
    if not step_count:
        return skeleton
    group = next(g for g in skeleton.groups if (g.site, g.kind) == group_key)
    return shrink.with_narrowed_group(skeleton, group, group.count - step_count * group.count // step_count_of(group))


def _branch_params_without_norms(skeleton: Skeleton, branch: Branch) -> int:
    """Parameters of the module that does a branch's work; of several modules, of those that multiply matrices."""

    def counts(part: Part) -> bool:
        is_inside = branch.site != branch.unit and f"{part.path}.".startswith(f"{branch.site}.")
        return is_inside or any(len(shape) > 1 for _, shape in part.tensors)

    inside = [p for p in skeleton.parts if p.path in branch.parts and counts(p)]
    return sum(math.prod(shape) for p in inside for _, shape in p.tensors)
