"""Cut what a `pruning_config.json` says."""

from typing import Literal

from ...compiler.analysis.discovery.bypass import other_operand_of_join
from ...compiler.analysis.discovery.discover import skeleton_of
from ...compiler.artifacts.pruning_config import Layer, layers_by_number, read_pruning_config
from ...compiler.ir.program import Program
from ...compiler.plugin.context import Context
from ...compiler.plugin.interfaces import Lossy, Pass, param
from ...compiler.transforms.editing.rewrite import Rewriter
from ...compiler.transforms.search.importance import ascending_indices, l1_importance
from ...compiler.transforms.search.widths import slice_group
from ...dsl.checker.skeleton import Group


class Apply(Pass):
    """Cut what a `pruning_config.json` says.

    The published form of MultiPruner: layers whose attention or MLP was removed, and how many query and MLP
    channels the others keep. A run with `--weight_reorder` keeps those of largest weight magnitude, one without
    it the first ones; the file doesn't say which it was. Attention widths are whole KV heads. Norms of removed
    branches go, too; one branch of the model has to stay. `emit ... { pruning_config("folder") }` writes the form.

    Source: MultiPruner (Munoz et al. 2025, arXiv 2501.09949), extract_model.py of its repository.
    Example: slim = prune.apply("pruning_config.json")
    """

    keeps = Lossy()
    changes = ("weights", "branches")
    makes = ("missing branches", "uneven widths")
    determinism = "deterministic"
    foreseeable = False
    reads = {"path": ("file",)}

    path: str = param("The file, relative to the recipe.", positional=True)
    reorder: Literal["l1", "none"] = param("Which items stay: those of largest magnitude, or the first.", default="l1")

    def files(self) -> tuple[str, ...]:
        return (self.path,)

    def run(self, program: Program, ctx: Context) -> None:
        skeleton = skeleton_of(program)
        config, layers = read_pruning_config(ctx.folder / self.path, skeleton), layers_by_number(skeleton)
        orders = {
            id(g): self._items_in_removal_order(program, g)
            for layer in layers
            for g in (layer.heads, layer.channels)
            if g
        }
        for kind, role in (("attn", "attention"), ("mlp", "mlp")):
            for number in config[f"pruned_{kind}_idx"]:
                self._drop_and_note_branch_of_role(program, layers[number], role)
        for number, layer in enumerate(layers):
            for kind, role, group in (("attn", "attention", layer.heads), ("mlp", "mlp", layer.channels)):
                if group and number not in config[f"pruned_{kind}_idx"]:
                    size = layer.head_size if role == "attention" else 1
                    width = config[f"pruned_{kind}_width"].get(str(number), group.count * size)
                    removed = orders[id(group)][: group.count - width // size]
                    if removed:
                        with Rewriter(program) as rewrite:
                            slice_group(program, rewrite, group, set(removed))

    def _items_in_removal_order(self, program: Program, group: Group) -> list[int]:
        """Items from the first to go to the last."""
        return (
            ascending_indices(l1_importance(program, group)) if self.reorder == "l1" else list(range(group.count))[::-1]
        )

    def _drop_and_note_branch_of_role(self, program: Program, config_layer: Layer, role: str) -> None:
        branch = config_layer.branches[role]
        current = next(b for b in skeleton_of(program).branches if b.site == branch.site)
        with Rewriter(program) as rewrite:
            graph = program.units[current.unit].graph
            rewrite.drop_branch(current.unit, current.join, keep=other_operand_of_join(graph, current))
        program.note(cut=branch.site, kind="blocks", by="pruning_config")
