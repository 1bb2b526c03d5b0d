"""Scans of state-space mixers that do without some of their states or heads while they run.

A state is gone where nothing is written to it: the rows of its B and C give zeros. A head is gone where its output is
zero. A norm over items takes its mean over those that are left: with what is gone at zero and so many of all left, the
norm of all, with its epsilon times that share, gives the root of the share too little, and is multiplied by it.
"""

import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ....dsl.checker.skeleton import Group, Member
from ...ir.surgery import replace_tensor_everywhere, tensor_at
from ..search.reconstruct import has_moments, module_of, readers

SCANNED = ("ssm_heads", "ssm_channels", "ssm_state")

Role = Literal["matrix", "convolution", "mixer", "norm"]


class _MaskSlot(NamedTuple):
    """Entry of one of the scans' mask tables, where the mask of a member's items is kept."""

    masks: dict[str, Tensor]
    key: str
    member: Member


def is_maskable_scan(model: nn.Module, group: Group) -> bool:
    """Whether hooks can stand for what slicing would do to a scan's group: its norms are tried."""
    roles = {module_of(m): _member_role(model, group, m) for m in group.members}
    norms = [m for m in group.members if roles[module_of(m)] == "norm"]
    if group.count < 2 or not all(_norm_equals_sliced_norm(model, group, m) for m in norms):
        return False
    if group.kind == "ssm_state":  # [channels, states] is the decay of the mixer, which a silent state may keep
        return all(m.axis == (1 if roles[module_of(m)] == "mixer" else 0) for m in group.members)
    return bool(group.readers) and all(has_moments(model, m) for m in readers(group))


def _member_role(model: nn.Module, group: Group, member: Member) -> Role:
    path = module_of(member)
    module = model.get_submodule(path)
    if isinstance(getattr(module, "base_layer", module), nn.Linear):
        return "matrix"
    if isinstance(module, nn.Conv1d):
        return "convolution"
    return "mixer" if path == group.site else "norm"


def _epsilon(module: nn.Module) -> str | None:
    """The one number of a norm that is no count, by name."""
    names = [name for name, value in vars(module).items() if isinstance(value, float)]
    return names[0] if len(names) == 1 else None


@torch.no_grad()
def _norm_equals_sliced_norm(model: nn.Module, group: Group, member: Member) -> bool:
    """Whether a norm over every second item is that over all, the others at zero, as is said above: it is tried."""
    module, path, chance = model.get_submodule(module_of(member)), module_of(member), torch.Generator().manual_seed(0)
    name = _epsilon(module)
    if name is None or member.axis or getattr(module, "weight", None) is None:
        return False
    original, items = copy.deepcopy(module).float().cpu(), range(0, group.count, 2)
    weight = tensor_at(original, "weight")
    width = weight.shape[0]
    indices = torch.tensor([i for item in items for i in member.indices(item)])
    share = len(indices) / width
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    inputs = [torch.randn(1, 3, width, generator=chance) for _ in parameters]
    narrow = copy.deepcopy(original)
    replace_tensor_everywhere(narrow, "weight", weight[indices].clone())
    for owner, count, per in group.attributes:
        if owner == path:
            setattr(narrow, count, round(getattr(narrow, count) - (group.count - len(items)) * per))
    setattr(original, name, getattr(original, name) * share)
    try:
        one = original(inputs[0] * torch.zeros(width).index_fill(0, indices, 1), *inputs[1:])[..., indices] * share**0.5
        other = narrow(*(x[..., indices] for x in inputs))
    except (RuntimeError, TypeError):  # a width that it has noted elsewhere, or inputs of other kinds
        return False
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


@dataclass
class Scans:
    """Active masks of scans. Each is [width] of 0 and 1, absent where all is 1.

    outputs  what the outputs of a matrix are multiplied with, by module
    weights  the rows of a convolution's parameter, by tensor
    norms    the first input of a norm, by module
    """

    model: nn.Module
    outputs: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def unmask_all(self) -> None:
        for masks in (self.outputs, self.weights, self.norms):
            masks.clear()

    def mask_items(self, group: Group, masked_items: Iterable[int]) -> None:
        """Do without these items of a group from now on."""
        for masks, key, member in self._mask_slots(group):
            tensor = self._tensor(member)
            mask = masks.setdefault(key, torch.ones(tensor.shape[0], device=tensor.device))
            mask[[i for item in sorted(masked_items) for i in member.indices(item)]] = 0

    def register_hooks(self, groups: Sequence[Group]) -> list[RemovableHandle]:
        """Hooks that follow what is silenced of these groups; `remove` them."""
        owners: dict[str, str] = {}  # module -> the mask's owner
        hooks: list[RemovableHandle] = []
        for group in groups:
            for masks, key, member in self._mask_slots(group):
                path = module_of(member)
                if masks is self.weights:
                    hooks += self._register_parameter_swap_hooks(group.site, key)
                elif path not in owners:
                    owners[path] = key
                    hooks += (
                        self._register_norm_hooks(path)
                        if masks is self.norms
                        else [self._register_output_mask_hook(path)]
                    )
        return hooks

    def _register_output_mask_hook(self, module_path: str) -> Any:
        def mask(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            return output * self.outputs[module_path].to(output.dtype) if module_path in self.outputs else None

        return self.model.get_submodule(module_path).register_forward_hook(mask)

    def _register_norm_hooks(self, norm_path: str) -> list[RemovableHandle]:
        module = self.model.get_submodule(norm_path)
        name = _epsilon(module)
        assert name is not None, f"{norm_path} has no epsilon"
        epsilon = getattr(module, name)

        def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if norm_path not in self.norms:
                return None
            over = self.norms[norm_path]
            setattr(module, name, epsilon * float(over.mean()))
            return (args[0] * over.to(args[0].dtype), *args[1:])

        def widen(module: nn.Module, _args: Any, output: Tensor | None) -> Tensor | None:
            setattr(module, name, epsilon)
            if norm_path not in self.norms or output is None:
                return None
            return output * float(self.norms[norm_path].mean()) ** 0.5

        before = module.register_forward_pre_hook(narrow)
        return [before, module.register_forward_hook(widen, always_call=True)]

    def _register_parameter_swap_hooks(self, mixer_path: str, tensor_path: str) -> list[RemovableHandle]:
        """A mixer reads its convolution's parameters itself: they are others while it is called."""
        path, _, name = tensor_path.rpartition(".")
        owner = self.model.get_submodule(path)
        originals: list[nn.Parameter] = []

        def silent(_module: nn.Module, _args: Any) -> None:
            if tensor_path in self.weights:
                parameter = owner._parameters[name]
                assert parameter is not None, f"{tensor_path} is silenced twice"
                over = self.weights[tensor_path].to(parameter.dtype)
                originals.append(parameter)
                owner._parameters[name] = None
                vars(owner)[name] = parameter * over.reshape(-1, *[1] * (parameter.dim() - 1))

        def restore(_module: nn.Module, _args: Any, _output: Any) -> None:
            if originals:
                del vars(owner)[name]
                owner._parameters[name] = originals.pop()

        module = self.model.get_submodule(mixer_path)
        before = module.register_forward_pre_hook(silent)
        return [before, module.register_forward_hook(restore, always_call=True)]

    def _tensor(self, member: Member) -> Tensor:
        path, _, name = member.tensor.rpartition(".")
        adapted = "base_layer" in dict(self.model.get_submodule(path).named_children())
        return tensor_at(self.model, f"{path}.base_layer.{name}" if adapted else member.tensor)

    def _mask_slots(self, group: Group) -> "list[_MaskSlot]":
        result = []
        for member in group.members:
            path, role = module_of(member), _member_role(self.model, group, member)
            if role == "norm":
                result.append(_MaskSlot(self.norms, path, member))
            elif group.kind == "ssm_state" and role == "matrix":
                result.append(_MaskSlot(self.outputs, path, member))
            elif group.kind == "ssm_state" and role == "convolution":
                result.append(_MaskSlot(self.weights, member.tensor, member))
        return result
