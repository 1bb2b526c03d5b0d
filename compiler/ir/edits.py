"""Edits since the base config, as plain data, and their replay on a fresh skeleton."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from torch import nn

from ...dsl.checker.skeleton import is_submodule
from ...dsl.syntax.diagnostics import Fault, Reject
from ...dsl.syntax.json_types import from_json, make_range_predicate
from ..core.json_errors import first_line
from ..core.safe_read import Unlisted
from . import editable_attributes, graph_json, surgery, targets
from .layers import fast_mixers, reft, swap_table
from .operations import checked_path

rejected_edits = Fault("refused-edits", "Stored edits don't fit the model they are replayed on.", exit="environment")

FORMAT = 1
_DEEPEST = 12


@runtime_checkable
class Swappable(Protocol):
    """A module that can take another's place: it can say in plain data how it is made again."""

    def spec(self) -> dict[str, Any]:
        """All that `from_spec` needs besides the module it replaces; sizes included, weights not."""

    @classmethod
    def from_spec(cls, old: nn.Module, spec: dict[str, Any]) -> nn.Module:
        """The module with empty weights, on the device of `old`: the module that it replaces, or goes into."""


@dataclass
class Edits:
    """All paths are those after the edits; whole values, not steps, so that replaying needs no order.

    layers      module list -> base numbers of the layers that are left
    deleted     modules that no graph calls any more
    swapped     path -> {"class": a name of `layers.swaps`, "spec": ...} for `from_spec`; a path that the base
                lacks is that of a new module
    shapes      parameter or buffer -> final shape
    attributes  attribute path -> plain value; configs included (`config.num_hidden_layers`)
    slots       unit -> cache slot, where it differs from the unit's position
    kinds       unit -> kind of its cache, as the base config says ("full_attention", ...)
    graphs      unit -> {"graph", "placeholders", "statics"}, for units whose data flow was edited
    """

    layers: dict[str, list[int]] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    swapped: dict[str, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    graphs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(data: Any) -> "Edits":
        """Raises Reject (refused-edits) on data of another form; graphs are checked when replayed."""
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.keys() != {"format", *_KINDS}:
            raise _damaged_edits_rejection("other fields than these: " + ", ".join(_KINDS))
        try:
            edits = Edits(**{name: from_json(data[name], kind, name) for name, kind in _KINDS.items()})
        except ValueError as error:
            raise _damaged_edits_rejection(f"data of another form: {error}") from error
        for entry in edits.swapped.values():
            entry["class"] = swap_table.registered_name(swap_table.CLASSES[entry["class"]])
        return edits

    def rename_paths(self, new_paths: dict[str, str]) -> None:
        """Follow layers that moved: old path -> new path."""
        for name in ("swapped", "shapes", "attributes", "slots", "kinds", "graphs"):
            setattr(self, name, {renamed_path(path, new_paths): value for path, value in getattr(self, name).items()})
        self.deleted = [renamed_path(path, new_paths) for path in self.deleted]

    def remove_subtree(self, path: str) -> None:
        """Drop what is said of a module and of everything below it."""
        for name in ("swapped", "shapes", "attributes", "slots", "kinds", "graphs"):
            remaining = {p: value for p, value in getattr(self, name).items() if not is_submodule(p, path)}
            setattr(self, name, remaining)
        self.deleted = [p for p in self.deleted if not is_submodule(p, path)]


def renamed_path(path: str, new_paths: dict[str, str]) -> str:
    """A path after the modules in `new_paths` took new places."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        new = new_paths.get(".".join(parts[:length]))
        if new is not None:
            return ".".join([new, *parts[length:]])
    return path


# -- replay --------------------------------------------------------------------------------------------------


def replay_edits(model: nn.Module, edits: Edits) -> None:
    """Bring a fresh model, built from the base config, into the form that the edits describe.

    Works on the meta device. Raises Reject (refused-edits).
    """
    try:
        _replay_unguarded(model, edits)
    except Unlisted as error:
        raise _damaged_edits_rejection(str(error)) from error
    except (AttributeError, AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged_edits_rejection(f"what the skeleton doesn't have: {first_line(error)}") from error


def _replay_unguarded(model: nn.Module, edits: Edits) -> None:
    surgery.unshare_config(model)
    for owner, left in edits.layers.items():
        layers = surgery.layers_at(model, owner)
        assert left == sorted(set(left)) and set(left) <= set(range(len(layers))), f"layers {left} of {owner}"
        for index in reversed(range(len(layers))):
            if index not in left:
                surgery.drop_layer(model, f"{owner}.{index}")
    units = sum(len(m) for m in model.modules() if isinstance(m, nn.ModuleList))
    assert all(slot < units for slot in edits.slots.values()), "a cache slot beyond the last layer"
    slots = _layer_positions(model, edits) | edits.slots
    layers_by_path = {path: model.get_submodule(path) for path in slots}
    for path in edits.deleted:
        surgery.delete_module_or_parameter(model, path)
    remaining = set(model.modules())  # an attention that is gone has no slot
    surgery.write_cache_slots(
        model, {path: slots[path] for path, layer in layers_by_path.items() if layer in remaining}
    )
    for path, entry in edits.swapped.items():
        _swap_or_add_module(model, path, swap_table.CLASSES[entry["class"]], entry["spec"])
    reft.share_prompt_positions(model)
    for path, shape in edits.shapes.items():
        _resize_tensor(model, path, shape)
    for path, value in edits.attributes.items():
        editable_attributes.refuse_unlisted_attribute(model, path, value)
        surgery.set_attribute(model, path, value)
    for path, entry in edits.graphs.items():
        within = any(is_submodule(other, path) for other in edits.graphs if other != path)
        assert not within, f"graphs within that of {path}"
        _bind_stored_graph(model, path, entry)
    if any(surgery.split_parent_and_name(path)[1] == fast_mixers.MARK for path in edits.attributes):
        fast_mixers.use_mixer_kernels(model, only_marked=True)


def _layer_positions(model: nn.Module, edits: Edits) -> dict[str, int]:
    return {f"{owner}.{i}": i for owner in edits.layers for i in range(len(surgery.layers_at(model, owner)))}


def _swap_or_add_module(model: nn.Module, path: str, kind: Any, spec: dict[str, Any]) -> None:
    """Build a module from its spec and put it in a module's place, or add it as a new module of its owner."""
    owner = surgery.module_at(model, surgery.split_parent_and_name(path)[0])
    if surgery.split_parent_and_name(path)[1] in owner._modules:
        surgery.replace_module(model, path, kind.from_spec(surgery.module_at(model, path), spec))
    else:
        surgery.add_module(model, path, kind.from_spec(owner, spec))


def _resize_tensor(model: nn.Module, path: str, shape: list[int]) -> None:
    old = surgery.tensor_at(model, path)
    if list(old.shape) != shape:
        assert len(shape) == old.dim() and all(0 < n <= m for n, m in zip(shape, old.shape, strict=True)), (
            f"{path} with shape {shape}"
        )
        surgery.replace_tensor_everywhere(model, path, torch.empty(shape, dtype=old.dtype, device=old.device))


def _bind_stored_graph(model: nn.Module, path: str, entry: dict[str, Any]) -> None:
    from .unit import Unit, graph_code_hash  # program.py holds an Edits, so it imports this file first

    graph = graph_json.graph_from_json(entry["graph"])
    targets.check_graph_targets(graph, surgery.module_at(model, path), type(model).__module__)
    names = [node.target for node in graph.nodes if node.op == "placeholder"]
    assert names == entry["placeholders"], f"other arguments than the graph of {path} has"
    unit = Unit(path, graph, tuple(entry["placeholders"]), entry["statics"], graph_code_hash(graph), edited=True)
    unit.install_graph_forward(model)


# -- reading -------------------------------------------------------------------------------------------------


def _damaged_edits_rejection(content: str) -> Reject:
    return rejected_edits(f"stored edits hold {content}").rejection()


def _is_json_value(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (list, dict)):
        items = value.values() if isinstance(value, dict) else value
        return depth < _DEEPEST and all(_is_json_value(item, depth + 1) for item in items)
    return value is None or isinstance(value, (bool, int, float, str))


def _is_well_formed_swap(entry: dict[str, Any]) -> bool:
    fits = entry.keys() == {"class", "spec"} and entry["class"] in list(swap_table.CLASSES)
    return fits and isinstance(entry["spec"], dict) and _is_json_value(entry["spec"])


def _is_well_formed_graph(entry: dict[str, Any]) -> bool:
    fits = entry.keys() == {"graph", "placeholders", "statics"} and isinstance(entry["statics"], dict)
    return (
        fits and isinstance(entry["placeholders"], list) and _is_json_value([entry["placeholders"], entry["statics"]])
    )


_Path = Annotated[str, lambda path: checked_path(path) == path]
_Text = Annotated[str, lambda text: len(text) < 200]
_Number = Annotated[int, make_range_predicate(0, 2**40 - 1)]
_KINDS = {
    "layers": dict[_Path, list[_Number]],
    "deleted": list[_Path],
    "swapped": dict[_Path, Annotated[dict[str, Any], _is_well_formed_swap]],
    "shapes": dict[_Path, list[_Number]],
    "attributes": dict[_Path, Annotated[Any, _is_json_value]],
    "slots": dict[_Path, _Number],
    "kinds": dict[_Path, _Text],
    "graphs": dict[_Path, Annotated[dict[str, Any], _is_well_formed_graph]],
}
