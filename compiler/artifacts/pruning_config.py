"""MultiPruner's `pruning_config.json`: what of each layer is gone, in the published form.

    {"pruned_attn_idx": [26, 24],              layers whose attention was removed, in order of removal
     "pruned_mlp_idx": [],
     "pruned_attn_width": {"0": 4096, ...},    query channels kept, of every layer; full where it was removed
     "pruned_mlp_width": {"0": 14336, ...}}    MLP channels kept

Source: MultiPruner's repository (IntelLabs/Hardware-Aware-Automated-Machine-Learning), run_multipruner.py.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...dsl.checker.skeleton import Branch, Group, Skeleton
from ...dsl.syntax.diagnostics import Fault, Reject
from ..analysis.planning.layer_profile import layer_group_counts, original_unit_path
from ..analysis.planning.selection import is_group_inside_branch
from ..core.json_errors import reject_on_error
from ..core.safe_read import MANIFEST, read_json
from ..ir.edits import renamed_path

invalid_pruning_config = Fault("bad-pruning-config", "A pruning_config.json is not one, or is another model's.")
no_published_form = Fault(
    "no-published-form", "A model has lost more, or other things, than a pruning_config.json can say."
)

_FIELDS = {"pruned_attn_idx": list, "pruned_mlp_idx": list, "pruned_attn_width": dict, "pruned_mlp_width": dict}
_ROLES = {"attn": "attention", "mlp": "mlp"}
_GROUPS = {
    "attention": {"heads": "groups of heads", "kv_heads": "groups of KV heads"},
    "mlp": {"channels": "groups of MLP channels"},
}


@dataclass(frozen=True)
class Layer:
    """Removable parts of a layer: its attention and MLP branches, and the groups inside."""

    branches: Mapping[str, Branch]
    heads: Group | None  # KV heads, or heads where each has keys of its own
    channels: Group | None

    @property
    def head_size(self) -> int:
        """Query channels of one item of `heads`."""
        return self.heads.members[-1].segments[0][1] if self.heads else 1

    def width(self, kind: str) -> int:
        if kind == "attn":
            return self.heads.count * self.head_size if self.heads else 0
        return self.channels.count if self.channels else 0


def layers_by_number(skeleton: Skeleton) -> list[Layer]:
    """Reject (no-published-form) where a layer has two of what the form gives one number."""
    layers = []
    for number, unit in enumerate(skeleton.units):
        branches = _require_one_per_kind(
            [(b.role, b) for b in skeleton.branches if b.unit == unit and _short_role(b.role)],
            number,
            {"attention": "attentions", "mlp": "MLPs"},
        )
        heads, channels = (
            _require_one_per_kind(
                [
                    (g.kind, g)
                    for g in skeleton.groups
                    if role in branches and g.kind in kinds and is_group_inside_branch(g, branches[role])
                ],
                number,
                kinds,
            )
            for role, kinds in _GROUPS.items()
        )
        layers.append(Layer(branches, heads.get("kv_heads", heads.get("heads")), channels.get("channels")))
    return layers


def _require_one_per_kind(
    items_by_kind: Sequence[tuple[str, Any]], layer_index: int, plural_nouns: Mapping[str, str]
) -> dict[str, Any]:
    twice = next((kind for kind, times in Counter(kind for kind, _ in items_by_kind).items() if times > 1), None)
    if twice:
        raise no_published_form(
            f"layer {layer_index} has two {plural_nouns[twice]}, the form knows one",
            help="`prune.multi`, `prune.blocks` and `prune.channels` cut such models",
        ).rejection()
    return dict(items_by_kind)


def read_pruning_config(path: Path, skeleton: Skeleton) -> dict[str, Any]:
    """The four fields, checked against the model that they are to be applied to."""
    config = _read_fields(path)
    layers = layers_by_number(skeleton)
    for kind in ("attn", "mlp"):
        _check_removed_numbers(config[f"pruned_{kind}_idx"], kind, layers, path)
        _check_layer_widths(config[f"pruned_{kind}_width"], kind, layers, path)
    if 0 < len(config["pruned_attn_idx"] + config["pruned_mlp_idx"]) == len(skeleton.branches):
        raise invalid_pruning_config(
            f"{path} removes every attention and MLP of the model", help="one has to stay: take its number out"
        ).rejection()
    return config


def _read_fields(path: Path) -> dict[str, Any]:
    with reject_on_error(invalid_pruning_config, f"{path} can't be read", "paths are relative to the recipe"):
        config = read_json(path, MANIFEST)
    if not isinstance(config, dict):
        raise invalid_pruning_config(
            f"{path} holds no object", help="it has four fields, pruned_attn_idx first"
        ).rejection()
    for name, kind in _FIELDS.items():
        if not isinstance(config.get(name, kind()), kind):
            raise invalid_pruning_config(f"`{name}` of {path} is no {'list' if kind is list else 'object'}").rejection()
    if not any(name in config for name in _FIELDS):
        raise invalid_pruning_config(f"{path} has none of {', '.join(_FIELDS)}").rejection()
    return {name: config.get(name, kind()) for name, kind in _FIELDS.items()}


def _check_removed_numbers(removed_layers: Sequence[Any], kind: str, layers: Sequence[Layer], path: Path) -> None:
    for layer_index in removed_layers:
        if type(layer_index) is not int or not 0 <= layer_index < len(layers):
            raise invalid_pruning_config(
                f"{path} removes {kind} {layer_index}, the model has {len(layers)} layers",
                help="take the config of a run on this model",
            ).rejection()
        if _ROLES[kind] not in layers[layer_index].branches:
            raise invalid_pruning_config(
                f"{path} removes {kind} {layer_index}, and layer {layer_index} has none"
            ).rejection()
    if len(set(removed_layers)) != len(removed_layers):
        raise invalid_pruning_config(f"{path} removes a layer's {kind} twice").rejection()


def _check_layer_widths(widths: Mapping[str, Any], kind: str, layers: Sequence[Layer], path: Path) -> None:
    numbered = {str(number): layer for number, layer in enumerate(layers)}
    for name, width in widths.items():
        if name not in numbered:
            raise invalid_pruning_config(
                f"{path} gives a width for layer {name}, the model has {len(layers)}",
                help=f"take the config of a run on this model: 0 to {len(layers) - 1}",
            ).rejection()
        layer = numbered[name]
        if not layer.width(kind):
            raise invalid_pruning_config(
                f"{path} gives a width for layer {name}, whose {_ROLES[kind]} can't be narrowed",
                help="leave this width out",
            ).rejection()
        full, step = layer.width(kind), layer.head_size if kind == "attn" else 1
        if type(width) is not int or not 0 < width <= full:
            raise invalid_pruning_config(
                f"{path} keeps {width} of {full} {kind} channels in layer {name}",
                help="take the config of a run on this model",
            ).rejection()
        if width % step:
            raise invalid_pruning_config(
                f"{path} keeps {width} query channels in layer {name}, a KV head has {step} of them",
                help="widths of attention are whole KV heads",
            ).rejection()


def to_published_config(
    before: Skeleton, after: Skeleton, removed_paths: Sequence[str], shapes_after: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """The published form of what was done to a model; Reject (no-published-form) where it can't say that.

    removed   paths of branches and layers in order of removal, each as it was by then
    remaining      of a module list whose layers were dropped, the first numbers of those that are left
    """
    config: dict[str, Any] = {name: kind() for name, kind in _FIELDS.items()}
    original_paths = {unit: original_unit_path(unit, shapes_after) for unit in after.units}
    layers, removed_branches = layers_by_number(before), _removed_branch_numbers(before, after, original_paths)
    for kind, number in _order_removed(
        removed_branches, before, set(before.units) - set(original_paths.values()), removed_paths
    ):
        config[f"pruned_{kind}_idx"].append(number)
    _refuse_partly_removed_kv_groups(layer_group_counts(before), layer_group_counts(after, shapes_after))
    expected, current_shapes = (
        before.shapes(),
        {renamed_path(path, original_paths): shape for path, shape in after.shapes().items()},
    )
    for number, layer in enumerate(layers):
        for kind, group in (("attn", layer.heads), ("mlp", layer.channels)):
            if group is not None:
                count = group.count if (kind, number) in removed_branches else _remaining_count(group, current_shapes)
                expected |= _narrowed_shapes(group, count, expected)
                size = layer.head_size if kind == "attn" else 1
                config[f"pruned_{kind}_width"][str(number)] = count * size
    _check_shapes(expected, current_shapes)
    return config


def _removed_branch_numbers(
    before: Skeleton, after: Skeleton, original_paths: Mapping[str, str]
) -> list[tuple[str, int]]:
    """(kind, number of the layer) of branches that are no longer there, layer by layer."""
    left: dict[str, Counter[str]] = {unit: Counter() for unit in before.units}
    for branch in after.branches:
        left[original_paths[branch.unit]][branch.role] += 1
    result = []
    for number, unit in enumerate(before.units):
        missing = Counter(b.role for b in before.branches if b.unit == unit) - left[unit]
        if other := next((role for role in missing if not _short_role(role)), None):
            raise _not_expressible_rejection(
                f"layer {number} has lost its {other} branch, the form knows attention and MLPs"
            )
        result += [(_short_role(role), number) for role in missing]
    return result


def _order_removed(
    removed_branches: Sequence[tuple[str, int]],
    before: Skeleton,
    removed_layer_paths: Collection[str],
    removed: Sequence[str],
) -> list[tuple[str, int]]:
    """Sort removed branches by the order of removal, or layer by layer where that can't be told.

    A layer that moved up was removed under a smaller number than its first one. So if the paths name just what is
    gone, none had moved; else some had, and which one a path meant is not known.
    """
    named = dict.fromkeys(
        (_short_role(branch.role), before.units.index(branch.unit))
        for path in removed
        for branch in before.branches
        if branch.site == path or (branch.unit == path and path in removed_layer_paths)
    )
    return list(named) if set(named) == set(removed_branches) else list(removed_branches)


def _remaining_count(group: Group, shapes_after: Mapping[str, Sequence[int]]) -> int:
    """Number of items that the readers still have."""
    reader = group.members[-1]
    if reader.tensor not in shapes_after:
        raise _not_expressible_rejection(f"{reader.tensor} was replaced, so how wide it is can't be said")
    return shapes_after[reader.tensor][reader.axis] // len(reader.indices(0))


def _narrowed_shapes(group: Group, count: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes of a group's tensors when it has only `count` items."""
    result: dict[str, tuple[int, ...]] = {}
    for member in group.members:
        shape = list(result.get(member.tensor, shapes[member.tensor]))
        shape[member.axis] -= (group.count - count) * len(member.indices(0))
        result[member.tensor] = tuple(shape)
    return result


def _refuse_partly_removed_kv_groups(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """An attention width counts KV heads with all query heads that they had."""
    for number, (unit, branches) in enumerate(before.items()):
        for name, branch_before in branches.items():
            branch_after = after.get(unit, {}).get(name, {})
            if "kv_heads" in branch_before and "heads" in branch_after:
                heads, pairs = branch_after["heads"], branch_after.get("kv_heads", branch_after["heads"])
                if heads * branch_before["kv_heads"] != branch_before["heads"] * pairs:
                    raise _not_expressible_rejection(
                        f"layer {number} keeps {heads} of {branch_before['heads']} query heads and {pairs} of "
                        f"{branch_before['kv_heads']} KV heads, the form counts KV heads with all of theirs",
                        help="cut heads `of kv_heads`, or leave this artifact out",
                    )


def _check_shapes(expected: Mapping[str, Sequence[int]], actual: Mapping[str, Sequence[int]]) -> None:
    """Nothing was narrowed but what the widths say."""
    for path, shape in actual.items():
        if tuple(expected.get(path, shape)) != tuple(shape):
            expected_text, actual_text = (" x ".join(map(str, s)) for s in (expected[path], shape))
            raise _not_expressible_rejection(
                f"{path} is {actual_text}, after what the form can say it is {expected_text}"
            )


def _not_expressible_rejection(
    fact: str, help: str = "leave this artifact out; manifests of the others say what was cut"
) -> Reject:
    return no_published_form(fact, help=help).rejection()


def _short_role(role: str) -> str:
    return next((short for short, full in _ROLES.items() if full == role), "")
