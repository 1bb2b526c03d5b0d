"""Groups of channels and heads that live and die together, with index maps, from the labels of a unit."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ....dsl.checker.skeleton import Group, Kind, Member
from .labelling import NO_LABEL, STREAM, Attention, Labelling
from .residual import common_ancestor_module

Index = tuple[str, int]  # (tensor, axis)


class IrregularLayout(Exception):
    """The items of a group don't lie in a pattern that a `Member` can say."""


@dataclass
class UnitGroups:
    """Groups of a unit, paths below it; `items` holds for each group the roots of each of its items."""

    groups: list[Group] = field(default_factory=list)
    items: list[list[frozenset[int]]] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (module, reason)
    leaving: bool = False  # channels of its own are handed on


def find_unit_groups(labelling: Labelling) -> UnitGroups:
    return _Search(labelling).find_groups()


class _Search:
    def __init__(self, labelling: Labelling):
        self.labelling = labelling
        self.root = labelling.component_roots()
        self.owner: dict[Index, np.ndarray] = {}  # root of each index; NOTHING where unlabelled
        self.reads: set[Index] = set()
        for claim in labelling.claims:
            self.owner[claim.tensor, claim.axis] = self.root[claim.labels]
            if claim.reads:
                self.reads.add((claim.tensor, claim.axis))
        self.blocked = {root: reason for labels, reason in labelling.blocked for root in self.root[labels]}
        self.weighed = {root for labels in labelling.weighed for root in self.root[labels]}
        self.result = UnitGroups(rejected=list(labelling.rejected))
        out = {root for root in self.root[labelling.output].tolist() if root not in (NO_LABEL, self.root[STREAM])}
        self.result.leaving = bool(out)
        self.leaving = out | {root for labels, _ in labelling.chosen for root in self.root[labels].tolist()} - {
            NO_LABEL
        }

    def find_groups(self) -> UnitGroups:
        free = np.ones(self.labelling.count, bool)
        free[[NO_LABEL, self.root[STREAM]]] = False
        for attention in self.labelling.attentions:
            free[self.add_head_groups(attention)] = False
        self.add_channel_groups(free)
        return self.result

    def add_head_groups(self, attention: Attention) -> list[int]:
        """Head groups of one attention call; returns the roots they use."""
        q, kv = self.root[attention.q].tolist(), self.root[attention.kv].tolist()
        used = sorted({*q, *kv})
        reason = self.rejection_reason(attention, used)
        if reason:
            self.record_refusal(attention.module, reason)
            return used
        repeat = len(q) // len(kv)
        heads = [frozenset({h}) for h in q]
        if repeat == 1:
            self.add_group_or_refuse("heads", heads, 0, attention.module)
        else:
            self.add_group_or_refuse("heads", heads, repeat, attention.module)
            blocks = [frozenset({g, *q[i * repeat : (i + 1) * repeat]}) for i, g in enumerate(kv)]
            self.add_group_or_refuse("kv_heads", blocks, 0, attention.module)
        return used

    def rejection_reason(self, attention: Attention, head_roots: list[int]) -> str | None:
        reason = next((self.blocked[r] for r in head_roots if r in self.blocked), None)
        if reason:
            return reason
        if not self.leaving.isdisjoint(head_roots):
            return "its heads leave the layer"
        if NO_LABEL in head_roots or self.root[STREAM] in head_roots:
            return "its heads are not made by a projection of their own"
        repeat, left = divmod(len(attention.q), len(attention.kv))
        if left:
            return f"{len(attention.kv)} KV heads don't divide {len(attention.q)} query heads"
        if len(head_roots) < len(attention.q) + (len(attention.kv) if repeat > 1 else 0):
            return "a norm or a mixing function runs over several heads"
        return None

    def add_channel_groups(self, is_free: np.ndarray) -> None:
        for roots in self.roots_of_equal_footprint(is_free):
            members = [index for index, owner in self.owner.items() if np.isin(owner, roots).any()]
            if not members:
                continue
            site = common_ancestor_module([module_path_of_tensor(tensor) for tensor, _ in members])
            reason = next((self.blocked[r] for r in roots.tolist() if r in self.blocked), None)
            readers = [index for index in members if index in self.reads]
            readers_only = bool(readers) and len(readers) < len(members)
            if readers_only and not self.leaving.isdisjoint(roots.tolist()):
                reason = reason or "its channels leave the layer, or are chosen by what they hold"
            if readers_only and not reason and self.are_coupled_into_one_item(roots, self.owner[readers[0]]):
                reason = "a norm or a mixing function runs over all its channels"
            if reason:
                self.record_refusal(
                    site or module_path_of_tensor(members[0][0]), reason
                )  # of two stacks no module encloses all
            elif readers_only:
                columns = self.owner[readers[0]]
                order = dict.fromkeys(columns[np.isin(columns, roots)].tolist())
                kind: Kind = "channels" if self.weighed.isdisjoint(order) else "heads"
                self.add_group_or_refuse(kind, [frozenset({root}) for root in order], 0, site)

    def are_coupled_into_one_item(self, roots: np.ndarray, columns: np.ndarray) -> bool:
        """Whether several channels are all coupled, and not because they are one attention head."""
        return len(roots) == 1 and (columns == roots[0]).sum() > 1 and self.weighed.isdisjoint(roots.tolist())

    def roots_of_equal_footprint(self, is_free: np.ndarray) -> Iterator[np.ndarray]:
        """Sets of roots that hold the same number of indices of the same tensors."""
        roots = np.flatnonzero(is_free & (self.root == np.arange(len(self.root))))
        if not len(roots) or not self.owner:
            return
        size = len(self.root)
        counts = np.stack([np.bincount(owner, minlength=size)[roots] for owner in self.owner.values()])
        _, first, kind = np.unique(counts, axis=1, return_index=True, return_inverse=True)
        for i in np.argsort(first):
            yield roots[kind.reshape(-1) == i]

    def add_group_or_refuse(self, kind: Kind, items: list[frozenset[int]], per_block: int, path: str) -> None:
        """Keep a group, unless it is kept: attentions that share a table of biases have all their heads in common."""
        if any(
            (group.kind, group.per_block) == (kind, per_block) and known == items
            for group, known in zip(self.result.groups, self.result.items, strict=True)
        ):
            return
        try:
            members = tuple(self.members_of_items(items))
        except IrregularLayout as error:
            self.record_refusal(path, str(error))
            return
        enclosing = common_ancestor_module([module_path_of_tensor(m.tensor) for m in members])
        self.result.groups.append(
            Group(
                enclosing,
                kind,
                len(items),
                members,
                (),
                per_block,
                sum((m.tensor, m.axis) in self.reads for m in members),
            )
        )
        self.result.items.append(items)

    def record_refusal(self, path: str, reason: str) -> None:
        if (path, reason) not in self.result.rejected:
            self.result.rejected.append((path, reason))

    def members_of_items(self, items: list[frozenset[int]]) -> Iterator[Member]:
        """Writers first, in the order of the forward, then readers."""
        item_of = np.full(self.labelling.count, -1)
        for i, roots in enumerate(items):
            item_of[list(roots)] = i
        for is_read in (False, True):
            for index, owner in self.owner.items():
                item = item_of[owner]
                if (index in self.reads) is is_read and (item >= 0).any():
                    yield Member(*index, segments_of_first_item(item, len(items), index[0]))


def segments_of_first_item(item_of_index: np.ndarray, n_items: int, tensor_name: str) -> tuple[tuple[int, int], ...]:
    """Segments (start, length) of a `Member` in one item, from the item of each index (-1: none).

    Raises IrregularLayout where items have other numbers of indices, or lie in no regular pattern.
    """
    sizes = np.bincount(item_of_index[item_of_index >= 0], minlength=n_items)
    if (sizes != sizes[0]).any():
        raise IrregularLayout(f"its items own unequal numbers of indices of {tensor_name}")
    order = np.argsort(item_of_index, kind="stable")[(item_of_index < 0).sum() :].reshape(n_items, -1)  # [item, index]
    runs = np.split(order[0], np.flatnonzero(np.diff(order[0]) != 1) + 1)
    steps = np.concatenate([np.full(len(run), len(run)) for run in runs])
    if (order != order[0] + np.arange(n_items)[:, None] * steps).any():
        raise IrregularLayout(f"its items lie in {tensor_name} in no regular pattern")
    return tuple((int(run[0]), len(run)) for run in runs)


def module_path_of_tensor(tensor_name: str) -> str:
    return tensor_name.rpartition(".")[0]
