"""A program that runs as a choice of widths and depth says, and the smaller program that such a choice is.

While it is elastic nothing is sliced: what readers of a dead item are given is zero, a layer that is left out hands on
what it was given, a branch that is left out adds nothing. Which items die first is an order beside the program, so
that its weights stay where they are, and the largest choice is the program itself, bit for bit.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ....dsl.checker.skeleton import Group, Member, Skeleton
from ...analysis.discovery.bypass import copy_without_branch, other_operand_of_join
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning import shrink
from ...ir.capture.refresh import copy_if_integers_changed
from ...ir.surgery import replace_tensor_everywhere, tensor_at
from ...ir.unit import Unit, graph_code_hash
from ..editing.rewrite import Rewriter
from ..search.reconstruct import has_moments, module_of, readers
from ..search.routing import expert_count_attributes
from ..search.savings import step_count_of
from ..search.uniform_widths import group_in_skeleton
from ..search.widths import RankedGroup, slice_groups, unit_of
from .choices import BLOCKS, KERNEL, LAYERS, WIDTHS, Space
from .kernels import crop_convolution_kernels, crop_weight, pad_kernel
from .mixtures import EXPERTS, Mixtures, is_maskable_experts
from .scans import SCANNED, Scans, is_maskable_scan

if TYPE_CHECKING:
    from ...ir.program import Program

Orders = Mapping[str, Sequence[int]]  # "SITE:KIND" -> items, those that die first in front
UnitState = tuple[
    frozenset[str], tuple[tuple[str, int], ...]
]  # branches that a unit runs without, numbers that are others
FULL_STATE: UnitState = (frozenset(), ())


def can_be_masked(program: "Program", group: Group) -> bool:
    """Whether zeros in what its readers are given do to a group what slicing would: readers are matrices. Of a scan's
    groups, whether `Scans` does, and of experts, whether `Mixtures` does."""
    model = program.model
    if group.kind == EXPERTS:
        return is_maskable_experts(program, group)
    if group.kind in SCANNED:
        return is_maskable_scan(model, group)
    return bool(group.readers) and all(
        has_moments(model, m) or _zeroed_inputs_equal_slicing(model, m) for m in readers(group)
    )


@torch.no_grad()
def _zeroed_inputs_equal_slicing(model: nn.Module, member: Member) -> bool:
    """Whether a convolution of another class, such as one that pads by itself, is narrowed by zeros: it is tried.

    One that makes its weight anew over all of its inputs is not.
    """
    module = model.get_submodule(module_of(member))
    if not isinstance(module, nn.Conv2d) or module.groups > 1 or member.axis != 1 or module.in_channels < 2:
        return False
    original, side, chance = (
        copy.deepcopy(module).float(),
        2 * max(module.kernel_size),
        torch.Generator().manual_seed(0),
    )
    x = torch.randn(1, module.in_channels, side, side, generator=chance).to(original.weight.device)
    x[:, ::2] = 0
    narrow = copy.deepcopy(original)
    replace_tensor_everywhere(narrow, "weight", original.weight[:, 1::2].clone())
    one, other = original(x), narrow(x[:, 1::2])
    return torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))


def removed_items(orders: Orders, group: Group, remaining_steps: int) -> set[int]:
    """The items that are gone where so many steps of a group are left."""
    return set(
        RankedGroup(group, list(orders[f"{group.site}:{group.kind}"])).least_important_per_block(
            step_count_of(group) - remaining_steps
        )
    )


@dataclass
class SubnetMasks:
    """The parts of a program that a choice turns off and on.

    masks   what modules are given is multiplied with, by path: [in] of 0 and 1, absent where all is 1
    off     units that hand on what they are given now
    kernels sizes of convolutions' kernels, by path, absent where they are whole
    crops   what was learned, or is, for smaller kernels
    scans   what scans of state-space mixers do without
    experts which of them layers of experts have left
    """

    program: "Program"
    space: Space
    orders: Orders
    crops: Mapping[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    off: set[str] = field(default_factory=set)
    kernels: dict[str, int] = field(default_factory=dict)
    _units: dict[tuple[str, UnitState], Unit] = field(default_factory=dict)
    _bound: dict[str, UnitState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        skeleton = skeleton_of(self.program)
        self.groups: dict[tuple[str, str], Group] = {(g.site, g.kind): g for g in skeleton.groups}
        self.branches = {b.site: b for b in skeleton.branches}
        self.scans = Scans(self.program.model)
        self.experts = Mixtures(self.program)

    def set_active_subnet(self, choice: Mapping[str, int]) -> None:
        """Run as a choice says from now on."""
        self.masks.clear()
        self.scans.unmask_all()
        self.experts.unmask_all()
        for kind in WIDTHS:
            for site, left in self.space.by_path(choice, kind).items():
                self._mask_items_beyond(self.groups[site, kind], left)
        largest = self.space.by_path(self.space.choice("largest"), KERNEL)
        self.kernels = {p: n for p, n in self.space.by_path(choice, KERNEL).items() if n < largest[p]}
        self.off.clear()
        self.off.update(unit for unit, on in self.space.by_path(choice, LAYERS).items() if not on)
        self._set_skipped_branches(frozenset(site for site, on in self.space.by_path(choice, BLOCKS).items() if not on))

    def _mask_items_beyond(self, group: Group, remaining_steps: int) -> None:
        removed = removed_items(self.orders, group, remaining_steps)
        if group.kind == EXPERTS:
            if removed:
                self.experts.mask_experts(group, removed)
            return
        if group.kind in SCANNED and removed:
            self.scans.mask_items(group, removed)
        for member in readers(group) if removed else ():
            path = module_of(member)
            weight = tensor_at(self.program.model, f"{self._inside(path)}.weight")
            mask = self.masks.setdefault(path, torch.ones(weight.shape[member.axis], device=weight.device))
            mask[[i for item in sorted(removed) for i in member.indices(item)]] = 0

    def _inside(self, path: str) -> str:
        """Path of a module that may have an adapter on it."""
        module = self.program.model.get_submodule(path)
        return f"{path}.base_layer" if "base_layer" in dict(module.named_children()) else path

    def _set_skipped_branches(self, sites: frozenset[str]) -> None:
        """Let units run without these branches, with the numbers of experts that they have now."""
        sites_by_unit: dict[str, frozenset[str]] = {}
        for site in sites:
            path = self.branches[site].unit
            sites_by_unit[path] = sites_by_unit.get(path, frozenset()) | {site}
        for path, unit in self.program.units.items():
            without = sites_by_unit.get(path, frozenset())
            follows = without or unit.edited  # else it runs its class's forward, which reads the numbers itself
            state = without, self.experts.changed_expert_counts(path) if follows else ()
            if self._bound.get(path, FULL_STATE) != state:
                self._install_unit_forward(path, state)

    def _install_unit_forward(self, unit_path: str, state: UnitState) -> None:
        unit, model = self.program.units[unit_path], self.program.model
        if state == FULL_STATE:
            del self._bound[unit_path]
            (unit.install_graph_forward if unit.edited else unit.restore_class_forward)(model)
            return
        if (unit_path, state) not in self._units:
            graph = unit.graph
            for site in sorted(state[0]):
                graph = copy_without_branch(graph, self.branches[site])
            graph = copy_if_integers_changed(graph, unit.module(model)) or graph if state[1] else graph
            self._units[unit_path, state] = replace(unit, graph=graph, key=graph_code_hash(graph), edited=True)
        self._units[unit_path, state].install_graph_forward(model)
        self._bound[unit_path] = state

    @contextmanager
    def hooks_installed(self) -> Iterator["SubnetMasks"]:
        """Follow what is taken; afterwards the program is as it was."""
        model, handles = self.program.model, []
        matrices = [self.groups[s, k] for k in WIDTHS if k != EXPERTS for s in self._sites(k)]
        paths = {module_of(m) for group in matrices for m in readers(group)}
        try:
            for path in sorted(paths):
                handles.append(model.get_submodule(path).register_forward_pre_hook(self._input_mask_hook(path)))
            handles += self.scans.register_hooks([self.groups[s, k] for k in SCANNED for s in self._sites(k)])
            handles += self.experts.register_hooks([self.groups[s, EXPERTS] for s in self._sites(EXPERTS)])
            for dim in self.space.of(KERNEL):
                for path in dim.places:
                    handles += self._register_kernel_hooks(path, dim.values)
            for unit in self._sites(LAYERS):
                handles.append(
                    model.get_submodule(unit).register_forward_hook(self._layer_skip_hook(unit), with_kwargs=True)
                )
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.masks.clear()
            self.scans.unmask_all()
            self.experts.unmask_all()
            self._set_skipped_branches(frozenset())
            self.kernels.clear()
            self.off.clear()

    def _sites(self, kind: str) -> list[str]:
        return [site for dim in self.space.of(kind) for site in dim.places]

    def _input_mask_hook(self, module_path: str) -> Any:
        def mask(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if module_path not in self.masks:
                return None
            over = self.masks[module_path].to(args[0].dtype)
            base = getattr(module, "base_layer", module)
            return (args[0] * (over[:, None, None] if isinstance(base, nn.Conv2d) else over), *args[1:])

        return mask

    def _register_kernel_hooks(self, conv_path: str, descending_sizes: Sequence[int]) -> list[RemovableHandle]:
        """A convolution runs with a smaller kernel in zeros while it is called, and has its own one afterwards."""
        module = self.program.model.get_submodule(conv_path)

        def exchange(module: nn.Module, _args: Any) -> None:
            if conv_path in self.kernels:
                original = module._parameters["weight"]
                assert original is not None, f"{conv_path} runs inside of itself"
                small = crop_weight(original, conv_path, descending_sizes, self.kernels[conv_path], self.crops)
                module._parameters["weight"], vars(module)["whole"] = None, original
                vars(module)["weight"] = pad_kernel(small, descending_sizes[0])

        def restore(module: nn.Module, _args: Any, _output: Any) -> None:
            if "whole" in vars(module):
                del vars(module)["weight"]
                module._parameters["weight"] = vars(module).pop("whole")

        before = module.register_forward_pre_hook(exchange)
        return [before, module.register_forward_hook(restore, always_call=True)]

    def _layer_skip_hook(self, unit_path: str) -> Any:
        def skip(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if unit_path not in self.off:
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return skip


def is_in_removed_unit_or_branch(
    skeleton: Skeleton, site: str, removed_units: Sequence[str], removed_branch_sites: Sequence[str]
) -> bool:
    """Whether a group's site goes with a layer, or with the innermost branch that it lies in.

    The site of one branch may lie in another's: BERT's MLP branch is called as its layer is.
    """
    within = unit_of(site, sorted((b.site for b in skeleton.branches), key=len, reverse=True))
    return bool(unit_of(site, removed_units)) or within in removed_branch_sites


def cut_program_to_choice(
    program: "Program", space: Space, orders: Orders, choice: Mapping[str, int], crop_matrices: Mapping[str, Tensor]
) -> None:
    """Make a program the smaller one that a choice is: kernels, widths, branches, then layers from the last."""
    crop_convolution_kernels(program, space, choice, crop_matrices)
    removed_units = [unit for unit, on in space.by_path(choice, LAYERS).items() if not on]
    sites = [site for site, on in space.by_path(choice, BLOCKS).items() if not on]
    skeleton = skeleton_of(program)
    cuts = []
    for kind in WIDTHS:
        for site, left in space.by_path(choice, kind).items():
            group = next(g for g in skeleton.groups if (g.site, g.kind) == (site, kind))
            if not is_in_removed_unit_or_branch(skeleton, site, removed_units, sites) and (
                items := removed_items(orders, group, left)
            ):
                cuts.append((group, items))
    if cuts:
        all_experts = [
            g
            for g in skeleton.groups
            if g.kind == EXPERTS and not is_in_removed_unit_or_branch(skeleton, g.site, removed_units, sites)
        ]
        fewer = [(group, len(items)) for group, items in cuts if group.kind == EXPERTS]
        is_even = len({count for _, count in fewer}) == 1
        above = list(expert_count_attributes(program, [group for group, _ in fewer], all_experts)) if is_even else []
        with Rewriter(program) as rewrite:
            slice_groups(program, rewrite, cuts)
            for name, count in above:
                rewrite.set_attr(name, count - fewer[0][1])
    for site in sites:
        branch = next((b for b in skeleton_of(program).branches if b.site == site), None)
        if branch is not None and branch.unit not in removed_units:
            with Rewriter(program) as rewrite:
                rewrite.drop_branch(
                    branch.unit, branch.join, keep=other_operand_of_join(program.units[branch.unit].graph, branch)
                )
    for unit in sorted(removed_units, key=list(program.units).index, reverse=True):
        with Rewriter(program) as rewrite:
            rewrite.drop_layer(unit)


def skeleton_of_choice(skeleton: Skeleton, space: Space, choice: Mapping[str, int]) -> Skeleton:
    """The skeleton of what `cut_program_to_choice` leaves, by arithmetic."""
    removed_units = [unit for unit, on in space.by_path(choice, LAYERS).items() if not on]
    sites = [site for site, on in space.by_path(choice, BLOCKS).items() if not on]
    for path, size in space.by_path(choice, KERNEL).items():
        skeleton = shrink.with_kernel_size(skeleton, path, size)
    full, branches = skeleton, {b.site: b for b in skeleton.branches}
    for kind in WIDTHS:
        for site, left in space.by_path(choice, kind).items():
            if not is_in_removed_unit_or_branch(full, site, removed_units, sites):
                group = group_in_skeleton(
                    skeleton, next(g for g in skeleton.groups if (g.site, g.kind) == (site, kind))
                )
                count = left * group.count // step_count_of(group)
                skeleton = shrink.with_narrowed_group(skeleton, group, count) if count != group.count else skeleton
    for site in sites:
        if branches[site].unit not in removed_units:
            skeleton = shrink.without_branch(skeleton, next(b for b in skeleton.branches if b.site == site))
    for unit in sorted(removed_units, key=skeleton.units.index, reverse=True):
        skeleton = shrink.without_unit(skeleton, unit)
    return skeleton
