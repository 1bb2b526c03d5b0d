"""Remove what contributes exactly zero."""

from collections.abc import Callable, Iterator

import torch
from torch import fx, nn
from transformers.pytorch_utils import Conv1D

from ...compiler.analysis.discovery.bypass import node_named, other_operand_of_join
from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.analysis.discovery.labelling import MOVES
from ...compiler.analysis.discovery.mixers.graphs import mixer_graphs
from ...compiler.analysis.discovery.residual import unwrap_identity
from ...compiler.evaluation.promise import outputs
from ...compiler.ir.graphs import target_name
from ...compiler.ir.layers.leaves import module_role
from ...compiler.ir.program import Program
from ...compiler.ir.surgery import tensor_at
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Close, Pass, param
from ...compiler.transforms.editing.rewrite import Rewriter
from ...compiler.transforms.editing.trial import with_branch_skipped, with_layer_skipped
from ...compiler.transforms.search.savings import steps_per_cut
from ...compiler.transforms.search.uniform_widths import note_and_report_refusals, split_cuttable_and_uncuttable
from ...compiler.transforms.search.widths import slice_groups
from ...dsl.checker.skeleton import Branch, Group, Member
from ...dsl.syntax.diagnostics import Fault

nothing_dead = Fault(
    "nothing-dead",
    "`clean.dead` found nothing to remove: every channel, head and branch contributes.\n\n"
    "A step that changes nothing is an error, so leave it out for models that were never masked or padded.",
)


class Dead(Pass):
    """Remove what contributes exactly zero.

    A channel or a head is dead where all weights that read it are zero, or all that make it are and it comes
    out as zero; a branch is where its output projection is zero, a layer where all of its branches are. So a
    model that was masked elsewhere, or filled up with zeros, gets as small as it is. Under grouped-query
    attention every KV head loses the same number of query heads; the last item, branch and layer always stay.
    Values decide, so `plan` can't foresee sizes.

    Source: own.
    Example: tidy = clean.dead(align: 8)
    """

    keeps = Close(atol=1e-4)
    changes = ("weights", "branches")
    determinism = "deterministic"
    foreseeable = False

    align: int = param("Widths of MLPs stay multiples of this.", default=1, ge=1, unit="channels")

    def run(self, program: Program, ctx: Context) -> None:
        version = program.version
        _drop_and_note_zero_layers(program)
        _drop_and_note_zero_branches(program)
        # KV heads first: query heads of one that is gone need no look.
        for kinds in (("kv_heads",), ("heads", "channels")):
            self._remove_dead_items(program, kinds, ctx)
        if program.version == version:
            raise nothing_dead(
                "no channel, head or branch of the model is dead",
                help="leave the step out; prune.* remove what matters least",
            ).rejection()

    def _remove_dead_items(self, program: Program, group_kinds: tuple[str, ...], ctx: Context) -> None:
        groups = [g for g in skeleton_of(program).groups if g.kind in group_kinds]
        silent = _zero_input_masks_in_one_run(program, groups)
        cuts = [
            (
                group,
                _dead_items_removable_in_all_blocks(
                    group, _unread_or_zero_items(program, group, silent), self._align(group)
                ),
            )
            for group in groups
        ]
        able, refusals = split_cuttable_and_uncuttable(
            program, [(g, len(dead) * (g.per_block or g.count) // g.count) for g, dead in cuts]
        )
        note_and_report_refusals(program, refusals, ctx.emit_event)
        with Rewriter(program) as rewrite:
            slice_groups(program, rewrite, [(group, dead) for group, dead in cuts if dead and group in able])

    def _align(self, group: Group) -> int:
        return steps_per_cut(group, self.align if group.kind == "channels" else 1)


# -- channels and heads --------------------------------------------------------------------------------------


def _unread_or_zero_items(program: Program, group: Group, zero_input_masks: dict[Member, torch.Tensor]) -> list[int]:
    """Items that nobody reads, or that are made of zeros and come out as zero."""

    def zero(members: tuple[Member, ...]) -> torch.Tensor:
        return torch.stack([~_any_of_item(_nonzero(program, m), m, group.count) for m in members]).all(0)

    readers = group.members[-group.readers :]
    # A buffer with an entry for each follows, and makes nothing.
    makers = tuple(
        m for m in group.members[: -group.readers] if isinstance(tensor_at(program.model, m.tensor), nn.Parameter)
    )
    # With all makers zero an item is the same whatever the input: one run tells whether that is zero.
    quiet = torch.stack([zero_input_masks[m] for m in readers]).all(0)
    return torch.nonzero(zero(readers) | (zero(makers) & quiet)).flatten().tolist()


def _dead_items_removable_in_all_blocks(group: Group, dead_items: list[int], step_multiple: int) -> set[int]:
    """The dead items that may go: as many of every block, and never the last step of it."""
    block = group.per_block or group.count
    by_block = [[i for i in dead_items if i // block == b] for b in range(group.count // block)]
    excess = block - min(map(len, by_block))
    excess = max(-(-excess // step_multiple), 1) * step_multiple
    return {i for items in by_block for i in items[: max(block - excess, 0)]}


@torch.no_grad()
def _zero_input_masks_in_one_run(program: Program, groups: list[Group]) -> dict[Member, torch.Tensor]:
    """Masks of the items that every reader gets as zeros throughout, [count] bool, from one run."""
    masks, handles = {}, []
    for group in groups:
        for member in group.members[-group.readers :]:
            masks[member] = torch.zeros(group.count, dtype=torch.bool)
            module = program.model.get_submodule(member.tensor.rpartition(".")[0])
            if isinstance(module, (nn.Linear, Conv1D)):  # others lay out their input in ways of their own
                masks[member] = torch.ones(group.count, dtype=torch.bool)
                handles.append(module.register_forward_pre_hook(_make_zero_input_hook(masks[member], member)))
    try:
        outputs(program)
    finally:
        for handle in handles:
            handle.remove()
    return masks


def _make_zero_input_hook(
    zero_input_mask: torch.Tensor, member: Member
) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonzero = (args[0] != 0).reshape(-1, args[0].shape[-1]).any(0).cpu()
        zero_input_mask.logical_and_(~_any_of_item(nonzero, member, len(zero_input_mask)))

    return hook


def _nonzero(program: Program, member: Member) -> torch.Tensor:
    """Mask of nonzero indices along the member's axis, [n] bool."""
    tensor = tensor_at(program.model, member.tensor).detach()
    return (tensor != 0).transpose(0, member.axis).reshape(tensor.shape[member.axis], -1).any(1).cpu()


def _any_of_item(flags: torch.Tensor, member: Member, count: int) -> torch.Tensor:
    """Whether any index of an item is set, [count] bool."""
    hits = torch.zeros(count, dtype=torch.bool)
    for start, size in member.segments:
        hits |= flags[start : start + count * size].reshape(count, size).any(1)
    return hits


# -- branches and layers -------------------------------------------------------------------------------------


def _drop_and_note_zero_layers(program: Program) -> None:
    """Layers all of whose branches give zero, from the last to the first."""
    before = outputs(program)
    for unit in reversed(list(program.units)):
        branches = [b for b in skeleton_of(program).branches if b.unit == unit]
        if len(program.units) > 1 and branches and all(_is_branch_output_always_zero(program, b) for b in branches):
            with with_layer_skipped(program, unit):
                same = torch.equal(outputs(program), before)
            if same:
                with Rewriter(program) as rewrite:
                    rewrite.drop_layer(unit)
                program.note(cut=unit, why="all of its branches give zero")


def _drop_and_note_zero_branches(program: Program) -> None:
    before = outputs(program)
    sites = [b.site for b in skeleton_of(program).branches if _is_branch_output_always_zero(program, b)]
    for site in sites:
        branch = next(b for b in skeleton_of(program).branches if b.site == site)
        with with_branch_skipped(program, branch):
            same = torch.equal(outputs(program), before)
        if same and len(skeleton_of(program).branches) > 1:
            with Rewriter(program) as rewrite:
                keep = other_operand_of_join(program.units[branch.unit].graph, branch)
                rewrite.drop_branch(branch.unit, branch.join, keep)
            program.note(cut=site, why="its output projection is zero")


def _is_branch_output_always_zero(program: Program, branch: Branch) -> bool:
    """Whether the last module that works on a branch has only zeros, and what follows keeps them."""
    unit = program.units[branch.unit]
    return _is_always_zero(program, node_named(unit.graph, branch.value), unit.path)


def _is_always_zero(program: Program, node: fx.Node, graph_module_path: str) -> bool:
    """Whether a value of the graph of the module `graph_module_path` is zero whatever comes in."""
    root = program.model.get_submodule(graph_module_path)
    while (before := _input_of_zero_preserving_node(node, root)) is not None:
        node = before
    if node.op != "call_module":
        return False
    name = str(node.target)
    module, inner_path = root.get_submodule(name), f"{graph_module_path}.{name}" if graph_module_path else name
    inside = mixer_graphs(program).get(inner_path)
    if inside is not None and inside.graph is not None:  # a mixer that is one node for the state that it keeps
        *_, output = inside.graph.nodes
        return isinstance(output.args[0], fx.Node) and _is_always_zero(program, output.args[0], inner_path)
    return isinstance(module, (nn.Linear, Conv1D)) and not any(p.any() for p in module.parameters())


def _input_of_zero_preserving_node(node: fx.Node, root_module: nn.Module) -> fx.Node | None:
    """Input of a node that maps zeros to zeros: casts, views, products with a number, norms."""
    if (behind := unwrap_identity(node)) is not node:
        return behind
    inputs = list(_tensors(node))
    if len(inputs) != 1:
        return None
    if node.op == "call_module":
        module = root_module.get_submodule(str(node.target))
        bias = getattr(module, "bias", None)
        return inputs[0] if module_role(module) == "norm" and (bias is None or not bias.any()) else None
    return inputs[0] if node.op != "placeholder" and target_name(node) in MOVES | {"mul"} else None


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    return (x for x in node.all_input_nodes if isinstance(x.meta.get("shape"), (tuple, list)))
