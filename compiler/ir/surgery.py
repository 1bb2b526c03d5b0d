"""Edits of a module tree, used by the rewriter and again when an artifact replays them.

Each keeps what belongs together: tied tensors, the sizes that a module states beside its weight, the layer
numbers below a module list.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from .traced_integers import LAYER_INDICES

_STATISTICS = frozenset({"running_mean", "running_var"})
_OF_TORCH = frozenset(vars(nn.Module()))  # tables of parameters and hooks, which torch keeps


def split_parent_and_name(path: str) -> tuple[str, str]:
    """(path of the owner, last name)."""
    owner, _, name = path.rpartition(".")
    return owner, name


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, found in the tables of modules alone. Raises LookupError where there is none.

    `get_submodule` asks Python for an attribute, which runs properties; a path that comes from a file must not.
    """
    for name in path.split(".") if path else ():
        child = model._modules.get(name)
        if child is None:
            raise LookupError(f"there is no module {path}")
        model = child
    return model


def layers_at(model: nn.Module, path: str) -> nn.ModuleList:
    """The list of layers at a path. Asserts that it is one."""
    layers = module_at(model, path)
    assert isinstance(layers, nn.ModuleList), f"{path}, which is no list of layers,"
    return layers


def tensor_at(model: nn.Module, path: str) -> torch.Tensor:
    """A parameter or buffer by path. Asserts that there is one."""
    owner, name = split_parent_and_name(path)
    module = module_at(model, owner)
    tensor = module._parameters.get(name, module._buffers.get(name))
    assert tensor is not None, f"{path} is no parameter or buffer"
    return tensor


def modules_holding_tensor(model: nn.Module, tensor: torch.Tensor) -> Iterator[tuple[str, nn.Module, str]]:
    """(module path, module, name) of every place that holds this very tensor: several if it is tied."""
    for path, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is tensor:
                yield path, module, name


def replace_tensor_everywhere(model: nn.Module, path: str, tensor: torch.Tensor) -> list[str]:
    """Exchange a tensor wherever it is held, with the sizes stated beside it; returns the paths."""
    old = tensor_at(model, path)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
    holders = list(modules_holding_tensor(model, old))
    for _, module, name in holders:
        table: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        table[name] = tensor
        module._non_persistent_buffers_set.discard(name)  # a constructor makes it in its old size
        _clear_cached_tensors(module)
        if name == "weight":
            set_sizes_from_weight(module)
    return [f"{owner}.{name}" if owner else name for owner, _, name in holders]


def dict_attributes(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """Dicts that a module's class keeps, without those of torch: LeViT's have the biases of its attention by device."""
    members = (member for name, member in vars(module).items() if name not in _OF_TORCH)
    return (member for member in members if type(member) is dict)


def _clear_cached_tensors(module: nn.Module) -> None:
    """Forget tensors that a forward computed from weights which are others now, and kept for the next one, by device.

    Other dicts are the module's own: `dummy_inputs`, or numbers that no forward computes again.
    """
    for table in dict_attributes(module):
        for key in [key for key, value in table.items() if isinstance(value, torch.Tensor) and _is_device_name(key)]:
            del table[key]


def _is_device_name(key: Any) -> bool:
    try:
        return isinstance(torch.device(key), torch.device) and not isinstance(key, int)
    except (RuntimeError, TypeError):
        return False


def set_sizes_from_weight(module: nn.Module) -> None:
    """Make the sizes that a module states follow its weight."""
    shape = tuple(tensor_at(module, "weight").shape)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = shape
    elif isinstance(module, _BatchNorm):
        module.num_features = shape[0]
    elif isinstance(module, nn.GroupNorm):
        # What is taken out are whole groups of channels.
        module.num_groups = _remaining_group_count(module.num_groups, module.num_channels, shape[0])
        module.num_channels = shape[0]
    elif isinstance(module, _ConvNd):
        _fit_convolution(module, shape)


def _fit_convolution(module: _ConvNd, shape: tuple[int, ...]) -> None:
    if module.groups > 1 and shape[1] == module.in_channels // module.groups:
        module.groups = _remaining_group_count(module.groups, module.out_channels, shape[0])
    assert shape[0] % module.groups == 0, f"{shape[0]} channels don't divide into {module.groups} groups"
    module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    module.kernel_size = shape[2:]


def _remaining_group_count(n_groups: int, n_channels: int, n_remaining: int) -> int:
    """Number of groups that `n_remaining` channels form, if whole groups were removed; else as before."""
    each = n_channels // n_groups
    return n_remaining // each if n_remaining % each == 0 else n_groups


def narrow_tensor(model: nn.Module, path: str, axis: int, remaining_indices: torch.Tensor) -> list[str]:
    """Keep some indices along one axis of a tensor, wherever it is tied; returns the paths that changed.

    remaining_indices   [n] int64, distinct, in the order in which they shall lie afterwards
    A batch norm's statistics follow its weight.
    """
    paths = _narrow_tensor_and_its_ties(model, path, axis, remaining_indices)
    owner, name = split_parent_and_name(path)
    if name == "weight" and isinstance(model.get_submodule(owner), _BatchNorm):
        for statistic in _STATISTICS & {n for n, t in model.get_submodule(owner)._buffers.items() if t is not None}:
            paths += _narrow_tensor_and_its_ties(model, f"{owner}.{statistic}", 0, remaining_indices)
    return paths


def _narrow_tensor_and_its_ties(model: nn.Module, path: str, axis: int, remaining_indices: torch.Tensor) -> list[str]:
    tensor = tensor_at(model, path)
    assert remaining_indices.numel() and remaining_indices.unique().numel() == remaining_indices.numel(), (
        f"{path}: indices repeat, or are none"
    )
    assert int(remaining_indices.min()) >= 0 and int(remaining_indices.max()) < tensor.shape[axis], (
        f"{path}: an index is out of range"
    )
    with torch.no_grad():
        return replace_tensor_everywhere(
            model, path, tensor.detach().index_select(axis, remaining_indices.to(tensor.device))
        )


def set_attribute(model: nn.Module, path: str, value: Any) -> None:
    """Set an attribute of a module, or of its config (`...self_attn.config.num_attention_heads`).

    What starts with `config.` is the root's config, one for all; a module below gets a copy of its own first,
    so that its neighbours keep theirs.
    """
    owner, name = split_parent_and_name(path)
    if owner == "config" or owner.startswith("config."):
        setattr(attribute_at(model, owner), name, value)
        return
    if not owner.endswith(".config"):
        setattr(model.get_submodule(owner), name, value)
        return
    module = model.get_submodule(owner.removesuffix(".config"))
    if any(other is not module and vars(other).get("config") is module.config for other in model.modules()):
        module.config = copy.copy(module.config)
    setattr(module.config, name, value)


def unshare_config(model: nn.Module) -> None:
    """Give a model configs of its own: a builder may have handed the same object to several models."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if config is not None:
            module.config = copy.deepcopy(config, copies)  # what is shared within the model stays shared


def path_of_governing_config(model: nn.Module, path: str) -> str:
    """Path of the config that governs a module, from the root: `config` or `config.text_config`."""
    config_name = saved_config_path_of_owner(model, path)
    assert config_name is not None, "the layers' config is neither the model's nor a part of it"
    return config_name


def saved_config_path_of_owner(model: nn.Module, path: str) -> str | None:
    """`path_of_governing_config` of a config that a module reads; None where it is a copy that is not saved with the
    model, as each stack of a T5 has."""
    while True:
        path = split_parent_and_name(path)[0]
        config = vars(model.get_submodule(path)).get("config")
        if config is not None or not path:
            break
    if config is model.config:
        return "config"
    name = next((name for name, value in vars(model.config).items() if value is config), None)
    return None if name is None else f"config.{name}"


def attribute_at(module: nn.Module, path: str) -> Any:
    """An attribute by a path below a module, configs included."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def drop_layer(model: nn.Module, path: str) -> dict[str, str]:
    """Take a layer out of its module list; returns old path -> new path of the layers behind it."""
    owner, name = split_parent_and_name(path)
    layers = model.get_submodule(owner)
    assert type(layers) is nn.ModuleList, f"{path} is no element of a module list"
    del layers[int(name)]
    return {f"{owner}.{i + 1}": f"{owner}.{i}" for i in range(int(name), len(layers))}


def write_cache_slots(model: nn.Module, slot_by_unit: dict[str, int]) -> None:
    """Write every unit's cache slot into the layer indices below it. Where a unit has several slots, as LongCat's two
    attentions of a layer have, all are counted, unit by unit."""
    indices = {path: _layer_indices_inside(model.get_submodule(path)) for path in slot_by_unit}
    are_several = any(len(inside) > 1 and inside[0] >= 0 and _is_consecutive(inside) for inside in indices.values())
    count = 0
    for path, slot in sorted(slot_by_unit.items(), key=lambda entry: entry[1]):
        unit = model.get_submodule(path)
        slot_of = {index: count + rank for rank, index in enumerate(indices[path])} if are_several else {}
        for module in unit.modules():
            for name in LAYER_INDICES & vars(module).keys():
                setattr(module, name, slot if module is unit else slot_of.get(vars(module)[name], slot))
        count += len(slot_of)


def _layer_indices_inside(unit: nn.Module) -> list[int]:
    """Layer indices of the modules below a unit, in their order."""
    attributes = (vars(module) for module in unit.modules() if module is not unit)
    indices = {values[name] for values in attributes for name in LAYER_INDICES & values.keys()}
    return sorted(index for index in indices if index is not None)


def _is_consecutive(indices: list[int]) -> bool:
    return indices == list(range(indices[0], indices[0] + len(indices)))


def delete_module_or_parameter(model: nn.Module, path: str) -> None:
    """Remove a module, or a parameter, that nothing calls any more."""
    owner, name = split_parent_and_name(path)
    module = module_at(model, owner)
    assert name in module._modules or name in module._parameters, f"{path} is no module and no parameter"
    delattr(module, name)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put another module in a module's place."""
    owner, name = split_parent_and_name(path)
    module = module_at(model, owner)
    assert name in module._modules, f"{path} is no module"
    module._modules[name] = new


def add_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a new module into one that has nothing of its name."""
    owner, name = split_parent_and_name(path)
    module = module_at(model, owner)
    assert name.isidentifier() and name not in dir(module), f"{path} is taken"
    module._modules[name] = new
