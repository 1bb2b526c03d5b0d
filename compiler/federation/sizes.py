"""Sub-networks of one model: for every client the largest that its budget allows, cut by the model's own symmetries.

Channels and heads are groups that discovery found: all tensors of a group are cut at the same items, so that what is
left is a model of its own whatever rotates or shares between them (rotary positions, grouped-query attention). Inside
a head nothing is permuted: under rotary positions that would be another function. Of each group the items of least
weight magnitude go first, RaFFM's salience, on all of the group's tensors and not on q and k alone.

Source: RaFFM, Yu et al. 2023 (arXiv 2310.00247); HeteroFL, Diao et al. 2021 (arXiv 2010.01264).
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...dsl.diagnostics import Fault, Reject
from .averaging import FedAvg
from .coverage import Counted, Index, coverage_mean, part_of
from .state import Shapes, State
from .strategy import Payload, Sent

if TYPE_CHECKING:
    from ...dsl.skeleton import Group
    from ..ir.program import Program
    from ..search.widths import Site

STEPS = 32  # into which every group is divided; a size keeps some of them

budget_too_small = Fault("budget-too-small", "No sub-network of a model is as small as a client's budget asks.")


@dataclass(frozen=True)
class Size:
    """
    params   that the sub-network has
    cuts     "site kind" -> items that go
    kept     tensor -> for each of its axes the indices that stay, None for all
    """

    params: int
    cuts: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[tuple[int, ...] | None, ...]]

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> "Size":
        cuts = {str(n): tuple(int(i) for i in items) for n, items in body["cuts"].items()}
        kept = {
            str(n): tuple(None if axis is None else tuple(int(i) for i in axis) for axis in axes)
            for n, axes in body["kept"].items()
        }
        return Size(int(body["params"]), cuts, kept)

    def fits(self, full: Shapes) -> bool:
        """Whether it names arrays that are there, and indices in them, ascending."""
        return all(
            name in full
            and len(axes) == len(full[name])
            and all(
                axis is None or (axis and list(axis) == sorted(set(axis)) and axis[0] >= 0 and axis[-1] < most)
                for axis, most in zip(axes, full[name], strict=True)
            )
            for name, axes in self.kept.items()
        )

    def index(self) -> dict[str, Index]:
        return {
            name: tuple(None if axis is None else np.array(axis, np.int64) for axis in axes)
            for name, axes in self.kept.items()
        }

    def shapes(self, full: Shapes) -> dict[str, tuple[int, ...]]:
        """Of the sub-network's arrays."""
        axes: dict[str, tuple[Any, ...]] = {n: self.kept.get(n, (None,) * len(shape)) for n, shape in full.items()}
        return {
            name: tuple(size if kept is None else len(kept) for size, kept in zip(shape, axes[name], strict=True))
            for name, shape in full.items()
        }


def sizes_for(program: "Program", budgets: Sequence[float]) -> list[Size]:
    """For each budget, a share of the model's parameters, the largest size within it.

    Raises Reject (budget-too-small), with the least that is possible, where none fits.
    """
    from ..planning import shrink
    from ..search.importance import ascending, l1
    from ..search.widths import Site

    sites = [Site(group, ascending(l1(program, group))) for group in cuttable_groups(program)]
    whole = Size(shrink.params(program.skeleton), {}, {})

    @cache
    def size(step: int) -> Size:
        return _narrowed(program, sites, step) if step < STEPS else whole

    found = []
    for share in budgets:
        step = bisect_right(range(1, STEPS + 1), share * whole.params, key=lambda n: size(n).params)
        if not step:
            raise Reject(
                budget_too_small(
                    f"a client's budget is {share:.0%} of {whole.params:,} parameters, and the smallest "
                    f"sub-network has {size(1).params:,}",
                    help=f"give it at least {math.ceil(100 * size(1).params / whole.params)}%",
                    argument="budgets",
                )
            )
        found.append(size(step))
    return found


def _narrowed(program: "Program", sites: Sequence["Site"], step: int) -> Size:
    """So many of STEPS parts of every group that can be cut, those that weigh most."""
    from ...dsl.values import Ratio
    from ..planning.amount import Amount
    from ..search.narrowing import cuttable, forecast

    groups = [s.group for s in sites]
    small = forecast(program.skeleton, groups, Amount(Ratio(step / STEPS, "")), 1)
    left = {(g.site, g.kind): g.count for g in small.groups}
    gone = [s.size - left.get((s.group.site, s.group.kind), 1) * s.size // s.group.count for s in sites]
    able, _ = cuttable(program, [(s.group, n) for s, n in zip(sites, gone, strict=True)])
    return _size(program, [(s.group, s.next(n)) for s, n in zip(sites, gone, strict=True) if n and s.group in able])


def cuttable_groups(program: "Program") -> list["Group"]:
    """Channels, and whole groups of heads that share keys and values, or heads where none share."""
    groups = program.skeleton.groups
    heads = "kv_heads" if any(g.kind == "kv_heads" for g in groups) else "heads"
    return [g for g in groups if g.kind in ("channels", heads)]


def _size(program: "Program", cuts: Sequence[tuple["Group", Sequence[int]]]) -> Size:
    shapes = {name: tuple(p.shape) for name, p in program.model.named_parameters()}
    gone: dict[tuple[str, int], set[int]] = {}
    for group, items in cuts:
        for member in group.members:
            at = gone.setdefault((member.tensor, member.axis), set())
            at |= {i for item in items for i in member.indices(item)}
    kept: dict[str, list[tuple[int, ...] | None]] = {}
    for (name, axis), lost in gone.items():
        if name in shapes:
            axes = kept.setdefault(name, [None] * len(shapes[name]))
            axes[axis] = tuple(i for i in range(shapes[name][axis]) if i not in lost)
    size = Size(
        0, {f"{g.site} {g.kind}": tuple(sorted(items)) for g, items in cuts}, {n: tuple(a) for n, a in kept.items()}
    )
    count = sum(int(np.prod(shape)) for shape in size.shapes(shapes).values())
    return Size(count, size.cuts, size.kept)


def cut(program: "Program", size: Size) -> None:
    """Make a program's model that sub-network: smaller tensors, fewer heads, nothing masked."""
    from ..editing.rewrite import Rewriter
    from ..search.widths import slice_all

    groups = {f"{g.site} {g.kind}": g for g in program.skeleton.groups}
    with Rewriter(program) as rewrite:
        slice_all(program, rewrite, [(groups[name], set(items)) for name, items in size.cuts.items()])


class Coverage(FedAvg):
    """Clients train sub-networks of different size.

    sizes     of the clients, by number; a client without one holds the whole model
    counted   among whom what a client changed of an entry counts (coverage.py)
    """

    def __init__(self, full: Shapes, sizes: Mapping[int, Size], counted: Counted = "all"):
        super().__init__(full)
        self.sizes, self.counted = sizes, counted
        self._index = {client: size.index() for client, size in sizes.items()}

    def tells_start(self, client: int) -> bool:
        return not (client in self.sizes and self.sizes[client].kept)

    def payload(self, client: int, number: int, holds: int | None) -> Payload:
        return Payload({"global": part_of(self.state, self._index.get(client, {}))})

    def wanted(self, client: int) -> Shapes:
        return self.sizes[client].shapes(self.full) if client in self.sizes else self.full

    def take(self, number: int, sent: Mapping[int, Sent]) -> None:
        parts: dict[int, State] = {k: s.state for k, s in sent.items()}
        indices = {k: self._index.get(k, {}) for k in sent}
        self.state = coverage_mean(self.state, parts, indices, {k: s.examples for k, s in sent.items()}, self.counted)
