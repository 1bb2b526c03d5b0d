"""Sub-networks of one model: for every client the largest within its budget, cut by the model's own symmetries.

Channels and heads are groups that discovery found: all tensors of a group are cut at the same items, so that what is
left is a model of its own whatever rotates or shares between them (rotary positions, grouped-query attention). Inside
a head nothing is permuted: under rotary positions that would be another function. Of each group the items of least
weight magnitude go first, RaFFM's salience, on all of the group's tensors and not on q and k alone.

Source: RaFFM, Yu et al. 2023 (arXiv 2310.00247); HeteroFL, Diao et al. 2021 (arXiv 2010.01264).
"""

import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ....dsl.syntax.diagnostics import Fault
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning import shrink
from ...analysis.planning.shrink import flops_per_token
from .averaging import FedAvg
from .budgets import (
    Budget,
    Load,
    absolute_budget,
    amount_phrase,
    budget_kind_of,
    median_update_seconds,
    smallest_fitting_budget_text,
    training_bytes,
)
from .coverage import CountMode, Index, assign_sandwich_sizes, coverage_mean, slice_state
from .state import Shapes
from .strategy import Payload, TrainedState, examples_of, states_of

if TYPE_CHECKING:
    from ....dsl.checker.skeleton import Group, Skeleton
    from ...ir.program import Program
    from ...transforms.search.widths import RankedGroup

STEPS = 32  # into which every group is divided; a size keeps some of them

budget_too_small = Fault("budget-too-small", "No sub-network of a model is as small as a client's budget asks.")


@dataclass(frozen=True)
class SubNetwork:
    """
    params   that the sub-network has
    cuts     "site kind" -> items that go
    indices  tensor -> for each of its axes the indices that stay, None for all
    """

    params: int
    cuts: Mapping[str, tuple[int, ...]]
    indices: Mapping[str, tuple[tuple[int, ...] | None, ...]]

    def indices_fit(self, full_shapes: Shapes) -> bool:
        """Whether it names arrays that are there, and indices in them, ascending."""
        return all(
            name in full_shapes
            and len(axes) == len(full_shapes[name])
            and all(
                axis is None or (axis and list(axis) == sorted(set(axis)) and axis[0] >= 0 and axis[-1] < extent)
                for axis, extent in zip(axes, full_shapes[name], strict=True)
            )
            for name, axes in self.indices.items()
        )

    def index(self) -> dict[str, Index]:
        return {
            name: tuple(None if axis is None else np.array(axis, np.int64) for axis in axes)
            for name, axes in self.indices.items()
        }

    def sub_network_shapes(self, full_shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes of the sub-network's arrays."""
        axes: dict[str, tuple[Any, ...]] = {
            n: self.indices.get(n, (None,) * len(shape)) for n, shape in full_shapes.items()
        }
        return {
            name: tuple(
                size if axis_index is None else len(axis_index)
                for size, axis_index in zip(shape, axes[name], strict=True)
            )
            for name, shape in full_shapes.items()
        }


def largest_sub_networks(
    program: "Program", budgets: Sequence[Budget], kind_if_unitless: str = "params", load: Load = Load()
) -> list[SubNetwork]:
    """For each budget the largest size within it; `kind_if_unitless` says what shares and plain numbers are of.

    Raises Reject (budget-too-small), with the least that is possible, where none fits.
    """
    scale = Scale(program, load)
    return [scale.largest_within(budget, budget_kind_of(budget, kind_if_unitless)) for budget in budgets]


class Scale:
    """All sizes of a program from the smallest, 1, to the whole, STEPS; each is worked out once."""

    def __init__(self, program: "Program", load: Load):
        from ...transforms.search.importance import ascending_indices, l1_importance
        from ...transforms.search.widths import RankedGroup

        self.program, self.load = program, load
        self.sites = [
            RankedGroup(group, ascending_indices(l1_importance(program, group))) for group in cuttable_groups(program)
        ]
        self._sizes: dict[int, SubNetwork] = {STEPS: SubNetwork(shrink.param_count(skeleton_of(program)), {}, {})}
        self._cost: dict[tuple[str, int], float] = {}

    def sub_network_at(self, step: int) -> SubNetwork:
        if step not in self._sizes:
            self._sizes[step] = _sub_network_at_step(self.program, self.sites, step)
        return self._sizes[step]

    def cost_of(self, budget_kind: str, step: int) -> float:
        """Cost of the size at a step, in the unit of that kind of budget."""
        if (budget_kind, step) not in self._cost:
            self._cost[budget_kind, step] = self._compute_cost(budget_kind, self.sub_network_at(step))
        return self._cost[budget_kind, step]

    def _compute_cost(self, budget_kind: str, size: SubNetwork) -> float:
        if budget_kind == "params":
            return size.params
        if budget_kind == "latency":
            from ...ir.capture.capture import capture

            part = capture(copy.deepcopy(self.program.model))
            cut_to_sub_network(part, size)
            return median_update_seconds(part.model, self.load)
        skeleton = skeleton_of_sub_network(self.program, size)
        return (
            training_bytes(skeleton, self.load)
            if budget_kind == "memory"
            else flops_per_token(skeleton, self.load.length)
        )

    def largest_within(self, budget: Budget, budget_kind: str) -> SubNetwork:
        """The largest size within a budget."""
        full_cost = self.cost_of(budget_kind, STEPS)
        available = absolute_budget(budget, full_cost)
        step = bisect_right(range(1, STEPS + 1), available, key=lambda n: self.cost_of(budget_kind, n))
        if step:
            return self.sub_network_at(step)
        least = self.cost_of(budget_kind, 1)
        raise budget_too_small(
            f"a client's budget is {amount_phrase(budget_kind, available)}, "
            f"and the smallest sub-network takes {amount_phrase(budget_kind, least)}",
            help=f"give it at least {smallest_fitting_budget_text(budget_kind, least, full_cost)}",
            argument="budgets",
        ).rejection()


def skeleton_of_sub_network(program: "Program", size: SubNetwork) -> "Skeleton":
    """The program's skeleton when it is that sub-network."""
    from ...transforms.search.uniform_widths import group_in_skeleton

    skeleton = skeleton_of(program)
    for group in skeleton_of(program).groups:
        removed = size.cuts.get(f"{group.site} {group.kind}", ())
        if removed:
            skeleton = shrink.with_narrowed_group(
                skeleton, group_in_skeleton(skeleton, group), group.count - len(removed)
            )
    return skeleton


def _sub_network_at_step(program: "Program", sites: Sequence["RankedGroup"], step: int) -> SubNetwork:
    """So many of STEPS parts of every group that can be cut, those that weigh most."""
    from ....dsl.checker.values import Ratio
    from ...analysis.planning.amount import Amount
    from ...transforms.search.uniform_widths import forecast_even_widths, split_cuttable_and_uncuttable

    groups = [s.group for s in sites]
    small = forecast_even_widths(skeleton_of(program), groups, Amount(Ratio(step / STEPS, "")), 1)
    left = {(g.site, g.kind): g.count for g in small.groups}
    removed = [s.size - left.get((s.group.site, s.group.kind), 1) * s.size // s.group.count for s in sites]
    able, _ = split_cuttable_and_uncuttable(program, [(s.group, n) for s, n in zip(sites, removed, strict=True)])
    return _sub_network_of_cuts(
        program,
        [
            (s.group, s.least_important_per_block(n))
            for s, n in zip(sites, removed, strict=True)
            if n and s.group in able
        ],
    )


def cuttable_groups(program: "Program") -> list["Group"]:
    """Channels, and whole groups of heads that share keys and values, or heads where none share."""
    groups = skeleton_of(program).groups
    heads = "kv_heads" if any(g.kind == "kv_heads" for g in groups) else "heads"
    return [g for g in groups if g.kind in ("channels", heads)]


def _sub_network_of_cuts(program: "Program", cuts: Sequence[tuple["Group", Sequence[int]]]) -> SubNetwork:
    shapes = {name: tuple(p.shape) for name, p in program.model.named_parameters()}
    removed: dict[tuple[str, int], set[int]] = {}
    for group, items in cuts:
        for member in group.members:
            at = removed.setdefault((member.tensor, member.axis), set())
            at |= {i for item in items for i in member.indices(item)}
    axes_of: dict[str, list[tuple[int, ...] | None]] = {}
    for (name, axis), removed_indices in removed.items():
        if name in shapes:
            axes = axes_of.setdefault(name, [None] * len(shapes[name]))
            axes[axis] = tuple(i for i in range(shapes[name][axis]) if i not in removed_indices)
    size = SubNetwork(
        0, {f"{g.site} {g.kind}": tuple(sorted(items)) for g, items in cuts}, {n: tuple(a) for n, a in axes_of.items()}
    )
    count = sum(int(np.prod(shape)) for shape in size.sub_network_shapes(shapes).values())
    return SubNetwork(count, size.cuts, size.indices)


def cut_to_sub_network(program: "Program", size: SubNetwork) -> None:
    """Make a program's model that sub-network: smaller tensors, fewer heads, nothing masked."""
    from ...transforms.editing.rewrite import Rewriter
    from ...transforms.search.widths import slice_groups

    groups = {f"{g.site} {g.kind}": g for g in skeleton_of(program).groups}
    with Rewriter(program) as rewrite:
        slice_groups(program, rewrite, [(groups[name], set(items)) for name, items in size.cuts.items()])


class Coverage(FedAvg):
    """Clients train sub-networks of different size.

    options   the sizes that there are
    size_of_client   client -> number of the size that its budget allows; one without holds the whole model
    count_mode  among whom what a client changed of an entry counts (coverage.py)
    seed      sizes are drawn anew each round: one client the largest, one the smallest, each of the others any that it
              can afford; None: each trains its own
    """

    def __init__(
        self,
        full_shapes: Shapes,
        options: Sequence[SubNetwork],
        size_of: Mapping[int, int],
        weighting: CountMode = "all",
        seed: int | None = None,
    ):
        super().__init__(full_shapes)
        self.options, self.size_of_client, self.count_mode, self.seed = tuple(options), dict(size_of), weighting, seed
        self.assignment = dict(size_of)  # client -> number of its size in this round
        self._indices = [size.index() for size in self.options]

    def prepare(self, round_number: int, clients: Sequence[int]) -> None:
        if self.seed is not None:
            order = sorted(range(len(self.options)), key=lambda n: -self.options[n].params)
            largest_index = {k: order.index(self.size_of_client[k]) for k in clients if k in self.size_of_client}
            assigned = assign_sandwich_sizes(clients, order, [self.seed, round_number], largest_index)
            self.assignment = {k: n for k, n in assigned.items() if k in self.size_of_client}

    def can_provide_initial_state(self, client: int) -> bool:
        return client not in self.size_of_client or not self.options[self.size_of_client[client]].indices

    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        config = {"size": self.assignment[client]} if client in self.assignment else {}
        return Payload({"global": slice_state(self.state, self._index(client))}, config)

    def _index(self, client: int) -> Mapping[str, Index]:
        return self._indices[self.assignment[client]] if client in self.assignment else {}

    def required_shapes(self, client: int) -> Shapes:
        return (
            self.options[self.assignment[client]].sub_network_shapes(self.full)
            if client in self.assignment
            else self.full
        )

    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        indices = {k: self._index(k) for k in client_states}
        self.state = coverage_mean(
            self.state, states_of(client_states), indices, examples_of(client_states), self.count_mode
        )
