"""MultiPruner's `pruning_config.json`: what of each layer is gone, in the published form.

    {"pruned_attn_idx": [26, 24],              layers whose attention was removed, in order of removal
     "pruned_mlp_idx": [],
     "pruned_attn_width": {"0": 4096, ...},    query channels kept, of every layer; full where it was removed
     "pruned_mlp_width": {"0": 14336, ...}}    MLP channels kept

Source: MultiPruner's repository (IntelLabs/Hardware-Aware-Automated-Machine-Learning), run_multipruner.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..dsl.diagnostics import Fault, Reject
from ..dsl.skeleton import Branch, Group, Skeleton
from .select import is_inside

bad_pruning_config = Fault("bad-pruning-config", "A pruning_config.json is not one, or is another model's.")

_FIELDS = {"pruned_attn_idx": list, "pruned_mlp_idx": list, "pruned_attn_width": dict, "pruned_mlp_width": dict}
_ROLES = {"attn": "attention", "mlp": "mlp"}


@dataclass(frozen=True)
class Layer:
    """What a layer can lose: its attention and MLP branches, and the groups inside."""

    branches: Mapping[str, Branch]
    heads: Group | None              # KV heads, or heads where each has keys of its own
    channels: Group | None

    @property
    def head_size(self) -> int:
        """Query channels of one item of `heads`."""
        return self.heads.members[-1].segments[0][1] if self.heads else 1

    def width(self, kind: str) -> int:
        if kind == "attn":
            return self.heads.count * self.head_size if self.heads else 0
        return self.channels.count if self.channels else 0


def layers_of(skeleton: Skeleton) -> list[Layer]:
    found = []
    for unit in skeleton.units:
        branches = {b.role: b for b in skeleton.branches if b.unit == unit}
        by_kind = {g.kind: g for g in skeleton.groups if any(is_inside(g, b) for b in branches.values())}
        found.append(Layer(branches, by_kind.get("kv_heads", by_kind.get("heads")), by_kind.get("channels")))
    return found


def read(path: Path, skeleton: Skeleton) -> dict[str, Any]:
    """The four fields, checked against the model that they are to be applied to."""
    config = _parsed(path)
    layers = layers_of(skeleton)
    for kind in ("attn", "mlp"):
        _check_removed(config[f"pruned_{kind}_idx"], kind, layers, path)
        _check_widths(config[f"pruned_{kind}_width"], kind, layers, path)
    return config


def _parsed(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise Reject(bad_pruning_config(f"{path} can't be read: {error.strerror}",
                                        help="paths are relative to the recipe")) from error
    except (ValueError, RecursionError) as error:
        raise Reject(bad_pruning_config(f"{path} is not JSON: {error}")) from error
    if not isinstance(config, dict):
        raise Reject(bad_pruning_config(f"{path} holds no object", help="it has four fields, pruned_attn_idx first"))
    for name, kind in _FIELDS.items():
        if not isinstance(config.get(name, kind()), kind):
            raise Reject(bad_pruning_config(f"`{name}` of {path} is no {'list' if kind is list else 'object'}"))
    if not any(name in config for name in _FIELDS):
        raise Reject(bad_pruning_config(f"{path} has none of {', '.join(_FIELDS)}"))
    return {name: config.get(name, kind()) for name, kind in _FIELDS.items()}


def _check_removed(numbers: Sequence[Any], kind: str, layers: Sequence[Layer], path: Path) -> None:
    for number in numbers:
        if type(number) is not int or not 0 <= number < len(layers):
            raise Reject(bad_pruning_config(f"{path} removes {kind} {number}, the model has {len(layers)} layers",
                                            help="take the config of a run on this model"))
        if _ROLES[kind] not in layers[number].branches:
            raise Reject(bad_pruning_config(f"{path} removes {kind} {number}, and layer {number} has none"))
    if len(set(numbers)) != len(numbers):
        raise Reject(bad_pruning_config(f"{path} removes a layer's {kind} twice"))


def _check_widths(widths: Mapping[str, Any], kind: str, layers: Sequence[Layer], path: Path) -> None:
    for name, width in widths.items():
        if not name.isdigit() or int(name) >= len(layers):
            raise Reject(bad_pruning_config(f"{path} gives a width for layer {name}, the model has {len(layers)}",
                                            help="take the config of a run on this model"))
        layer = layers[int(name)]
        full, step = layer.width(kind), layer.head_size if kind == "attn" else 1
        if type(width) is not int or not 0 < width <= full:
            raise Reject(bad_pruning_config(f"{path} keeps {width} of {full} {kind} channels in layer {name}",
                                            help="take the config of a run on this model"))
        if width % step:
            raise Reject(bad_pruning_config(
                f"{path} keeps {width} query channels in layer {name}, a KV head has {step} of them",
                help="widths of attention are whole KV heads"))


def written(before: Skeleton, after: Skeleton, removed: Sequence[str]) -> dict[str, Any]:
    """The published form of what was done to a model; `removed` are branch sites in order of removal."""
    config: dict[str, Any] = {name: kind() for name, kind in _FIELDS.items()}
    number = {unit: str(i) for i, unit in enumerate(before.units)}
    left = {b.site for b in after.branches}
    now = {(g.site, g.kind): g for g in after.groups}
    sites = {b.site: (_short(b.role), number[b.unit]) for b in before.branches if _short(b.role)}
    gone = [s for s in sites if s not in left]
    for site in sorted(gone, key=lambda s: removed.index(s) if s in removed else len(removed)):
        kind, layer = sites[site]
        config[f"pruned_{kind}_idx"].append(int(layer))
    for index, layer in enumerate(layers_of(before)):
        for kind, group in (("attn", layer.heads), ("mlp", layer.channels)):
            if group is not None:
                same = now.get((group.site, group.kind)) or now.get((group.site, "heads"))
                stays = same and layer.branches[_ROLES[kind]].site in left
                count = same.count if stays else group.count
                config[f"pruned_{kind}_width"][str(index)] = count * (layer.head_size if kind == "attn" else 1)
    return config


def _short(role: str) -> str:
    return next((short for short, full in _ROLES.items() if full == role), "")

