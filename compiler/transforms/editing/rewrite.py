"""The few edits that a pass may make, each of which leaves model, graphs, config and record consistent."""

import copy
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel

from ....dsl.checker.skeleton import is_submodule
from ...analysis.discovery.dead_rows import (
    copy_with_narrowed_literals,
    is_unread_by_label,
    live_indices_by_tensor_axis,
    matmul_modules_with_fewer_users,
)
from ...analysis.discovery.dependent_integers import Baked
from ...ir import graph_json, slots, surgery
from ...ir.capture.capture import retrace_units
from ...ir.capture.refresh import copy_if_integers_changed
from ...ir.edits import Swappable, renamed_path
from ...ir.graphs import ancestors, caches_kv, contains_attention, referenced_paths, uses_self_attention_cache
from ...ir.layers import swap_table
from ...ir.liveness import bypass_addition, eliminate_dead_code
from ...ir.program import Program
from ...ir.unit import Unit, graph_code_hash
from ...models.rows.inputs import is_encoder_decoder
from .counted_positions import loses_position_counter
from .dry_run import dry_run_or_reject, frees_nothing, layer_needed, unread_output_indices

_ADDS = (operator.add, operator.iadd, torch.add)
_LAYER_TYPES = "layer_types"


class Rewriter:
    """Edits a program. As a context manager it re-captures the touched units at the end:

    with Rewriter(program) as rewrite:
        rewrite.narrow("model.layers.3.mlp.up_proj.weight", 0, keep)
    """

    def __init__(self, program: Program):
        self.program = program
        self.touched: set[str] = set()
        self.dirty = False

    def __enter__(self) -> "Rewriter":
        return self

    def __exit__(self, exception_type: type | None, error: BaseException | None, trace: Any) -> None:
        if exception_type is None:
            self.commit()

    def commit(self) -> None:
        """Re-capture the touched units and raise the program's version; nothing if nothing was edited."""
        if not self.dirty:
            return
        for unit in [unit for unit in self.program.units.values() if unit.edited]:
            fresh = copy_if_integers_changed(unit.graph, unit.module(self.program.model))
            if fresh is not None:
                unit.graph, unit.key = fresh, graph_code_hash(fresh)
                self.bind_and_record_edited_unit(unit)
        retrace_units(self.program, self.touched)
        self.touched, self.dirty = set(), False

    # -- edits of the tree -----------------------------------------------------------------------------------

    def narrow(self, tensor_path: str, axis: int, keep: torch.Tensor | Sequence[int]) -> None:
        """Keep some indices along an axis of one parameter or buffer, in the order given.

        Tied tensors, `in/out_features`, a Conv1D's `nf`, convolution groups and normalised shapes follow. A
        bias is a tensor of its own: narrow it, too. Asserts that indices are distinct, in range and not none.
        """
        keep = torch.as_tensor(keep, dtype=torch.int64).cpu()
        for narrowed_path in surgery.narrow_tensor(self.program.model, tensor_path, axis, keep):
            self.program.edits.shapes[narrowed_path] = list(surgery.tensor_at(self.program.model, narrowed_path).shape)
            self._touch(narrowed_path)

    def set_attr(self, attribute_path: str, value: Any) -> None:
        """Set an attribute of a module or config; `value` is plain data.

        `config.x` is the whole model's; `model.layers.3.self_attn.config.x` gives that module its own config.
        """
        surgery.set_attribute(self.program.model, attribute_path, value)
        self.program.edits.attributes[attribute_path] = value
        self._touch(attribute_path)

    def swap_module(self, path: str, new: nn.Module) -> None:
        """Put a module of effc (see `edits.Swappable`) in a module's place."""
        entry = _entry(new)
        surgery.replace_module(self.program.model, path, new)
        self.program.edits.remove_subtree(path)
        self.program.edits.swapped[path] = entry
        self._touch(path)

    def add_module(self, path: str, new: nn.Module) -> None:
        """Put a new module of effc (see `edits.Swappable`) into a module that has none of that name."""
        surgery.add_module(self.program.model, path, new)
        self.program.edits.swapped[path] = _entry(new)
        self._touch(path)

    def take_module(self, path: str) -> None:
        """Take out a module that `add_module` put in and that no graph calls any more."""
        assert path in self.program.edits.swapped, f"{path} was not put in"
        surgery.delete_module_or_parameter(self.program.model, path)
        self.program.edits.remove_subtree(path)
        self._touch(path)

    def drop_layer(self, layer_path: str) -> None:
        """Remove a whole unit. The units behind it move up, so drop from the last to the first.

        Raises Reject (layer-needed), with nothing changed, if the model does not run without it, or its config has no
        number of layers that could be one less.
        """
        if reason := self._reason_config_cannot_lose_layer(layer_path):
            raise layer_needed(
                f"{layer_path} can't be removed: {reason}", help="remove residual branches instead"
            ).rejection()
        dry_run_or_reject(self.program, layer_path, lambda trial: Rewriter(trial)._remove_layer_unchecked(layer_path))
        self._remove_layer_unchecked(layer_path)

    def _reason_config_cannot_lose_layer(self, layer_path: str) -> str | None:
        """Why the config can't say that a layer is gone. `num_hidden_layers` of two stacks is the encoder's alone."""
        model = self.program.model
        where = surgery.saved_config_path_of_owner(model, surgery.split_parent_and_name(layer_path)[0])
        if where is None or (isinstance(model, PreTrainedModel) and is_encoder_decoder(model)):
            return "effc keeps no number of layers for each stack of such a model"
        if not isinstance(getattr(surgery.attribute_at(model, where), "num_hidden_layers", None), int):
            return "the config of the model names no number of layers"
        return None

    def _remove_layer_unchecked(self, layer_path: str) -> None:
        program, edits = self.program, self.program.edits
        kinds = self._record_cache_kinds_once()
        owner, index = surgery.split_parent_and_name(layer_path)
        new_paths = surgery.drop_layer(program.model, layer_path)
        left = edits.layers.setdefault(owner, list(range(len(surgery.layers_at(program.model, owner)) + 1)))
        del left[int(index)]
        edits.remove_subtree(layer_path)
        edits.rename_paths(new_paths)
        program.opaque = {
            renamed_path(p, new_paths): reason
            for p, reason in program.opaque.items()
            if not is_submodule(p, layer_path)
        }
        self.touched = {renamed_path(p, new_paths) for p in self.touched if p != layer_path}
        program.units = {u.path: u for u in self._rename_and_rebind_remaining_units(layer_path, new_paths)}
        self._remove_layer_from_config(owner, int(index))
        self._assign_cache_slots({renamed_path(p, new_paths): kind for p, kind in kinds.items() if p != layer_path})
        self.dirty = True

    def _rename_and_rebind_remaining_units(self, removed_path: str, new_path_by_old: dict[str, str]) -> Iterable[Unit]:
        for unit in self.program.units.values():
            if unit.path != removed_path:
                unit.path = renamed_path(unit.path, new_path_by_old)
                if unit.edited:
                    unit.install_graph_forward(self.program.model)
                yield unit

    def _remove_layer_from_config(self, layer_list_path: str, index: int) -> None:
        where = surgery.path_of_governing_config(self.program.model, layer_list_path)
        config = surgery.attribute_at(self.program.model, where)
        count = config.num_hidden_layers
        # Both before either is set: a list that was shortened looks like one that names layers by number.
        shorter = {
            name: slots.without_entry(value, index) for name, value in slots.per_layer_values(config, count).items()
        }
        shorter |= {
            name: slots.renumber_after_removal(value, index)
            for name, value in slots.layer_index_lists(config, count).items()
        }
        for name, value in shorter.items():
            self.set_attr(f"{where}.{name}", value)
        self.set_attr(f"{where}.num_hidden_layers", count - 1)

    def delete(self, path: str) -> None:
        """Take away a module or a parameter that no graph reads any more."""
        surgery.delete_module_or_parameter(self.program.model, path)
        self.program.edits.remove_subtree(path)
        self.program.edits.deleted.append(path)
        self._touch(path)

    # -- edits of the data flow ------------------------------------------------------------------------------

    def drop_branch(self, unit_path: str, add_node_name: str, keep: str | None = None, frees: float = 0) -> None:
        """Remove one residual branch of a unit: its add gives what came in.

        add_node_name  name of the residual add in the unit's graph
        keep   name of the operand that stays; by default the one that the other is computed from
        Modules that nothing calls any more are deleted; cache slots are assigned anew.
        frees  parameters that should go with it
        Raises Reject, with nothing changed, if the model does not run without them (layer-needed), or if most of
        those parameters would stay (frees-nothing).
        """
        unread = unread_output_indices(self.program, unit_path)
        label = f"what {add_node_name} adds in {unit_path}"
        edit = (unit_path, add_node_name, keep, unread)
        trial = dry_run_or_reject(self.program, label, lambda trial: Rewriter(trial)._remove_branch_unchecked(*edit))
        if loses_position_counter(self.program, trial, unit_path):
            raise layer_needed(
                f"{label} can't be removed: it is the last attention that counts the tokens before it, and "
                f"{type(self.program.model).__name__} has a table of positions",
                help="remove another branch",
            ).rejection()
        freed = _param_count(self.program.model) - _param_count(trial.model)
        if freed < frees / 2:
            raise frees_nothing(
                f"without {label}, {freed:,} of {frees:,.0f} parameters would go: what stays reads what it computes",
                help="narrow it instead: `prune.channels`, `prune.heads`",
            ).rejection()
        self._remove_branch_unchecked(*edit)

    def _remove_branch_unchecked(
        self, unit_path: str, add_node_name: str, remaining_operand_name: str | None, unread_indices: frozenset[int]
    ) -> None:
        program = self.program
        kinds = self._record_cache_kinds_once()
        unit = program.units[unit_path]
        before = referenced_paths(unit.graph)
        graph = copy.deepcopy(unit.graph)
        add = next((node for node in graph.nodes if node.name == add_node_name), None)
        assert add is not None and add.target in _ADDS, f"{add_node_name} is no addition in {unit_path}"
        stays = _remaining_operand(add, remaining_operand_name)
        removed = ancestors(add) - ancestors(stays) - {stays}
        bypass_addition(add, stays)
        _replace_unread_outputs_with_none(graph, unread_indices, removed)
        eliminate_dead_code(graph)
        graph_json.graph_to_json(graph)  # what can't be stored is refused while nothing has changed yet
        edited = Unit(unit_path, graph, unit.placeholders, unit.statics, graph_code_hash(graph), edited=True)
        program.units[unit_path] = edited
        self._delete_unreferenced_modules(edited, before)
        if any(matmul_modules_with_fewer_users(unit.graph, edited.graph)):
            self._remove_unread_rows_if_possible(edited)
        self.bind_and_record_edited_unit(edited)
        self._assign_cache_slots(kinds)

    def _remove_unread_rows_if_possible(self, unit: Unit) -> None:
        """Take away rows that only a part read which is gone: branches may hang on one projection.

        Where what is left divides them in a way that can't be told, they stay.
        """
        from ...analysis.discovery.discover import residual_stream_input
        from ...analysis.discovery.labels import label_graph

        layer, stream = unit.module(self.program.model), residual_stream_input(unit.graph)
        labelling = label_graph(unit.graph, layer, stream.name if stream else None)
        dead_rows = is_unread_by_label(labelling, labelling.output)
        try:
            graph = copy_with_narrowed_literals(unit.graph, labelling, dead_rows, layer)
        except Baked:
            return
        unit.graph, unit.key = graph, graph_code_hash(graph)
        for (tensor, axis), keep in live_indices_by_tensor_axis(labelling, dead_rows).items():
            self.narrow(f"{unit.path}.{tensor}" if unit.path else tensor, axis, keep)

    def set_unit_graph(self, unit_path: str, graph: fx.Graph) -> None:
        """Let a unit run another graph over the same modules."""
        eliminate_dead_code(graph)
        graph_json.graph_to_json(graph)  # what can't be stored is refused while nothing has changed yet
        unit = self.program.units[unit_path]
        edited = Unit(unit_path, graph, unit.placeholders, unit.statics, graph_code_hash(graph), edited=True)
        self.program.units[unit_path] = edited
        self.bind_and_record_edited_unit(edited)

    def bind_and_record_edited_unit(self, unit: Unit) -> None:
        """Bind a unit whose graph was edited, and record the graph."""
        unit.install_graph_forward(self.program.model)
        plain = {name: _as_list(value) for name, value in unit.statics.items() if _is_plain(value)}
        self.program.edits.graphs[unit.path] = {
            "graph": graph_json.graph_to_json(unit.graph),
            "placeholders": list(unit.placeholders),
            "statics": plain,
        }
        self.dirty = True

    def _delete_unreferenced_modules(self, unit: Unit, paths_referenced_before: set[str]) -> None:
        after = referenced_paths(unit.graph)
        layer = unit.module(self.program.model)
        dead: list[str] = []
        for inner, _ in layer.named_modules():
            if inner and not any(is_submodule(inner, deleted) for deleted in dead):
                used_before = any(is_submodule(p, inner) or is_submodule(inner, p) for p in paths_referenced_before)
                used_after = any(is_submodule(p, inner) or is_submodule(inner, p) for p in after)
                if used_before and not used_after:
                    dead.append(inner)
        for inner in dead:
            self.delete(f"{unit.path}.{inner}" if unit.path else inner)

    # -- cache slots -----------------------------------------------------------------------------------------

    def _record_cache_kinds_once(self) -> dict[str, str]:
        """Kind of each unit's cache by the base config, by unit path; remembered before the config is bent to slots."""
        program = self.program
        if not isinstance(program.model, PreTrainedModel) or is_encoder_decoder(program.model):
            return dict.fromkeys(program.units, slots.UNIFORM)
        if not program.edits.kinds:
            first = next(iter(program.units), "")
            where = surgery.saved_config_path_of_owner(program.model, first)  # None of a copy, as CANINE has
            config = surgery.attribute_at(program.model, where) if where is not None else None
            kinds = getattr(config, _LAYER_TYPES, None) or ()
            if len(kinds) != len(program.units):
                kinds = [slots.UNIFORM] * len(program.units)
            program.edits.kinds = dict(zip(program.units, kinds, strict=True))
        return program.edits.kinds

    def _assign_cache_slots(self, cache_kind_by_unit: dict[str, str]) -> None:
        program, paths = self.program, list(self.program.units)
        program.edits.kinds = cache_kind_by_unit
        if is_encoder_decoder(program.model):
            self._assign_cache_slots_by_stack(cache_kind_by_unit)
            return
        assigned = self._slots(paths, cache_kind_by_unit)
        slot_by_path = dict(zip(paths, assigned.slots, strict=True))
        program.edits.slots = {path: slot_by_path[path] for i, path in enumerate(paths) if slot_by_path[path] != i}
        surgery.write_cache_slots(program.model, slot_by_path)
        if not paths or not isinstance(program.model, PreTrainedModel):
            return
        where = surgery.saved_config_path_of_owner(program.model, paths[0])
        if where is None:
            return
        config = surgery.attribute_at(program.model, where)
        if _LAYER_TYPES in slots.per_layer_values(config, len(paths)):
            self.set_attr(f"{where}.{_LAYER_TYPES}", list(assigned.kinds))

    def _assign_cache_slots_by_stack(self, cache_kind_by_unit: dict[str, str]) -> None:
        """An encoder's layers and a decoder's are numbered apart."""
        stacks: dict[str, list[str]] = {}
        for path in self.program.units:
            stacks.setdefault(surgery.split_parent_and_name(path)[0], []).append(path)
        changed: dict[str, int] = {}
        for paths in stacks.values():
            slot_by_path = dict(zip(paths, self._slots(paths, cache_kind_by_unit).slots, strict=True))
            surgery.write_cache_slots(self.program.model, slot_by_path)
            changed |= {path: slot_by_path[path] for i, path in enumerate(paths) if slot_by_path[path] != i}
        self.program.edits.slots = changed

    def _slots(self, paths: list[str], cache_kind_by_unit: dict[str, str]) -> slots.Slots:
        graphs = [self.program.units[path].graph for path in paths]
        live, attend, masked = (
            tuple(map(predicate, graphs)) for predicate in (uses_self_attention_cache, caches_kv, contains_attention)
        )
        return slots.assign_cache_slots(tuple(cache_kind_by_unit[path] for path in paths), live, attend, masked)

    def _touch(self, path: str) -> None:
        unit = next((unit for unit in self.program.units if is_submodule(path, unit)), None)
        # An edit outside the units (embedding, head, config) can change what any of them sees.
        self.touched |= {unit} if unit else set(self.program.units)
        self.dirty = True


def _param_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _replace_unread_outputs_with_none(
    graph: fx.Graph, unread_indices: frozenset[int], removed_nodes: set[fx.Node]
) -> None:
    """Give None for values that nobody reads and that only what is lost was needed for."""
    output = next(node for node in graph.nodes if node.op == "output")
    returned = list(output.args[0]) if unread_indices else []
    for index in sorted(unread_indices):
        if isinstance(value := returned[index], fx.Node) and removed_nodes & {value, *ancestors(value)}:
            remaining = {x for i, x in enumerate(returned) if i != index and isinstance(x, fx.Node)}
            if value not in remaining.union(*map(ancestors, remaining)):
                returned[index] = None
    if unread_indices:
        output.args = (tuple(returned),)


def _entry(new: nn.Module) -> dict[str, Any]:
    """Record of a module that is inserted."""
    assert isinstance(new, Swappable), f"{type(new).__name__} can't say how it is made again"
    return {"class": swap_table.registered_name(type(new)), "spec": new.spec()}


def _remaining_operand(add_node: fx.Node, operand_name: str | None) -> fx.Node:
    operands = [node for node in add_node.args[:2] if isinstance(node, fx.Node)]
    assert len(operands) == 2, f"{add_node.name} adds other things than two values"
    if operand_name is not None:
        assert operand_name in {node.name for node in operands}, f"{operand_name} is no operand of {add_node.name}"
        return next(node for node in operands if node.name == operand_name)
    for entry, branch in (operands, operands[::-1]):
        if entry in ancestors(branch):
            return entry
    raise AssertionError(f"neither operand of {add_node.name} is computed from the other: say which one stays")


def _is_plain(value: Any) -> bool:
    """Whether a baked argument can be stored: numbers, texts, and sizes made of them."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, (list, tuple)) else value
