"""Groups of a state-space mixer: heads of a scan, its channels where each has a time step of its own, its states."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import lcm

import numpy as np
import torch
from torch import fx, nn

from .....dsl.checker.skeleton import Group, Kind, Member
from ....ir.traced_integers import evaluate_expression
from ..coupling import IrregularLayout, segments_of_first_item
from ..dependent_integers import Baked, Name, Need, literal_needs, read_attribute
from ..labels import NO_LABEL, STREAM
from .mixer_labels import Scan, ScanLabelling, Span, label_mixer


@dataclass(frozen=True)
class Parts:
    """Parts of a mixer; paths are relative to it.

    rejected     why a kind of item can't be told apart
    understood   whether it has one scan, of the kind that dt, A, B and C are given to
    """

    groups: tuple[Group, ...] = ()
    rejected: tuple[str, ...] = ()
    understood: bool = True


def parts_of_mixer(graph: fx.Graph, mixer: nn.Module) -> Parts:
    labelling = label_mixer(graph, mixer)
    if len(labelling.scans) != 1:
        problems = labelling.unsupported or [f"it has {len(labelling.scans)} scans"]
        return Parts(rejected=tuple(problems), understood=False)
    return _Mixer(labelling, mixer).groups_of_scan(labelling.scans[0])


class _Mixer:
    def __init__(self, labelling: ScanLabelling, mixer: nn.Module):
        self.labelling, self.mixer = labelling, mixer
        self.root = labelling.component_roots()
        self.blocked = {root: reason for labels, reason in labelling.blocked for root in self.root[labels].tolist()}

    def groups_of_scan(self, scan: Scan) -> Parts:
        groups, refusals = [], []
        blocks = len(scan.states)
        if scan.heads:
            norms = [span.channels // span.size for span in self.labelling.spans]
            evenly = lcm(blocks, *norms)
            candidates: list[tuple[Kind, np.ndarray, int]] = [("ssm_heads", self.root[scan.items], evenly)]
        else:
            candidates = [("ssm_channels", self.root[scan.items], 1)]
        candidates.append(("ssm_state", self.root[scan.states].ravel(), blocks))
        for kind, items, evenly in candidates:
            try:
                groups.append(self.make_group(kind, items, evenly))
            except (IrregularLayout, Baked) as error:
                refusals.append(f"{_NAMES[kind]}: {error}")
        return Parts(tuple(groups), tuple(refusals))

    def make_group(self, kind: Kind, items: np.ndarray, n_blocks: int) -> Group:
        count = len(items)
        if len(set(items.tolist())) < count:
            raise IrregularLayout("a norm or a mixing function runs over several of them")
        if not {NO_LABEL, self.root[STREAM]}.isdisjoint(items.tolist()):
            raise IrregularLayout("they are not made by a projection of the mixer's own")
        blocked = next((self.blocked[r] for r in items.tolist() if r in self.blocked), None)
        if blocked:
            raise IrregularLayout(blocked)
        if count % n_blocks:
            raise IrregularLayout(f"{count} of them don't divide into {n_blocks} groups")
        writers, reading = list(self.members(items, False)), list(self.members(items, True))
        attributes = self.attribute_changes_per_item(kind, items, n_blocks)
        return Group(
            "", kind, count, (*writers, *reading), attributes, count // n_blocks if n_blocks > 1 else 0, len(reading)
        )

    def members(self, items: np.ndarray, is_read: bool) -> Iterator[Member]:
        item_of = np.full(self.labelling.count, -1)
        item_of[items] = np.arange(len(items))
        for claim in self.labelling.claims:
            item = item_of[self.root[claim.labels]]
            if claim.reads is is_read and (item >= 0).any():
                yield Member(claim.tensor, claim.axis, segments_of_first_item(item, len(items), claim.tensor))

    # -- integers that follow --------------------------------------------------------------------------------

    def attribute_changes_per_item(
        self, kind: Kind, items: np.ndarray, n_blocks: int
    ) -> tuple[tuple[str, str, float], ...]:
        """(module, attribute, what one item less takes from it). Raises Baked."""
        if len(items) == n_blocks:
            return ()
        probed = items[:: len(items) // n_blocks]
        removed = np.zeros(self.labelling.count, bool)
        removed[probed] = True
        needs = list(literal_needs(self.labelling, torch.from_numpy(removed[self.root]), self.mixer))
        values = _infer_attribute_values(needs, self.mixer)
        attributes = [
            (module, name, (read_attribute(self.mixer, (module, name)) - value) / len(probed))
            for (module, name), value in values.items()
        ]
        return (
            *attributes,
            *self.norm_size_changes(kind, items),
            *self.unread_channel_count_attributes(kind, items, needs),
        )

    def unread_channel_count_attributes(
        self, kind: Kind, items: np.ndarray, needs: Sequence[Need]
    ) -> Iterator[tuple[str, str, float]]:
        """Attributes that say the number of channels and that no literal is read from: initialisers read them."""
        if kind == "ssm_channels":
            named = {name for need in needs for _, name in need.source_names().values()}
            yield from (
                ("", name, 1.0)
                for name, value in vars(self.mixer).items()
                if type(value) is int and value == len(items) and name not in named
            )

    def norm_size_changes(self, kind: Kind, items: np.ndarray) -> Iterator[tuple[str, str, float]]:
        """Sizes over which norms behind the scan take their means, evenly over its groups."""
        if kind == "ssm_state":
            return
        for span in self.labelling.spans:
            width = span.channels // len(items)
            yield span.module, span.attribute, width * span.size / span.channels


def _infer_attribute_values(needs: Sequence[Need], mixer: nn.Module) -> dict[Name, int]:
    """The attributes that must take other values: those that a literal is read from as they are, or where none is, one
    that gives every literal the value it needs. Raises Baked."""
    values: dict[Name, int] = {}
    for need in needs:
        names = need.source_names()
        if need.source in names and need.value != need.needed:
            name = names[need.source]
            if values.setdefault(name, need.needed) != need.needed:
                raise Baked(f"`{name[1]}` would need two values")
    unmet = _unmet_literal_need(needs, values, mixer)
    for name in unmet.source_names().values() if unmet else ():
        for value in range(1, read_attribute(mixer, name)):
            if name not in values and _unmet_literal_need(needs, values | {name: value}, mixer) is None:
                return values | {name: value}
    if unmet:
        raise Baked(f"`{unmet.source}` is {unmet.value} where {unmet.needed} is needed")
    return values


def _unmet_literal_need(needs: Sequence[Need], values: dict[Name, int], mixer: nn.Module) -> Need | None:
    """A literal that would have another value than it needs."""
    for need in needs:
        if (
            evaluate_expression(need.source, partial(_attribute_value, need.source_names(), values, mixer))
            != need.needed
        ):
            return need
    return None


def _attribute_value(names: Mapping[str, Name], values: Mapping[Name, int], mixer: nn.Module, path: str) -> int:
    return values.get(names[path], read_attribute(mixer, names[path]))


_NAMES = {"ssm_heads": "heads of its scan", "ssm_channels": "channels of its scan", "ssm_state": "states of its scan"}

__all__ = ["Parts", "Span", "parts_of_mixer"]
