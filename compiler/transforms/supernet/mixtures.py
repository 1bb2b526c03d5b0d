"""Layers of experts that do without some of them while they run.

A router runs as if those that are left were all: its rows are cut for the call, and the numbers that it chooses are
turned into what the experts have among all. So it chooses and weighs as it will when the others are cut out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from ....dsl.checker.skeleton import Group, Member, is_submodule
from ...analysis.discovery.discover import skeleton_of
from ...ir.layers.leaves import module_role
from ...ir.surgery import attribute_at, set_attribute, tensor_at
from ..search.reconstruct import module_of, readers
from ..search.widths import unit_of

if TYPE_CHECKING:
    from ...ir.program import Program

EXPERTS = "experts"


def is_maskable_experts(program: "Program", group: Group) -> bool:
    """Whether hooks can stand for what slicing would do to experts: a router of its own chooses them and hands on
    their numbers and as many weights; of what else has a part for each, only buffers."""
    model, packed = program.model, {module_of(m) for m in readers(group)}
    if len(packed) != 1 or _shares_router(program, group):
        return False
    unrouted = [m for m in _router_members(group) if module_role(model.get_submodule(module_of(m))) != "router"]
    parameters = dict(model.named_parameters())
    return all(m.tensor not in parameters for m in unrouted) and _gets_expert_indices(program, group, *packed)


def _router_members(group: Group) -> list[Member]:
    """Weights of the router, and of modules around it, that belong to each expert."""
    return list(group.members[: len(group.members) - group.readers])


def _shares_router(program: "Program", group: Group) -> bool:
    """Whether other experts are chosen by the same router."""
    scores = {m.tensor for m in _router_members(group)}
    return any(
        g.kind == EXPERTS and g != group and not scores.isdisjoint(m.tensor for m in g.members)
        for g in skeleton_of(program).groups
    )


def _gets_expert_indices(program: "Program", group: Group, experts_path: str) -> bool:
    path = unit_of(group.site, list(program.units))
    inner = experts_path.removeprefix(f"{path}.") if path else experts_path
    nodes = program.units[path].graph.nodes if path in program.units else ()
    calls = [node for node in nodes if node.op == "call_module" and node.target == inner]
    return len(calls) == 1 and _receives_indices_and_weights(calls[0])


def _receives_indices_and_weights(call: fx.Node) -> bool:
    """Whether experts are called with numbers [tokens, chosen] and weights of that shape."""
    inputs = call.all_input_nodes
    numbers = [x.meta.get("shape") for x in inputs if "int" in str(x.meta.get("dtype"))]
    weights = [x.meta.get("shape") for x in inputs if "float" in str(x.meta.get("dtype"))]
    return len(numbers) == 1 and weights[-1:] == numbers


@dataclass
class Mixtures:
    """alive  the experts that are left of a layer, in order, by site; absent where all are
    around    what buffers and numbers outside of routers were before, by path
    """

    program: "Program"
    alive: dict[str, Tensor] = field(default_factory=dict)
    around: dict[str, Any] = field(default_factory=dict)

    def unmask_all(self) -> None:
        model = self.program.model
        for path, before in self.around.items():
            if isinstance(before, Tensor):
                _set_buffer(model, path, before)
            else:
                set_attribute(model, path, before)
        self.alive.clear()
        self.around.clear()

    def mask_experts(self, group: Group, masked_experts: Iterable[int]) -> None:
        """Do without these experts of a layer from now on."""
        model = self.program.model
        device = tensor_at(model, group.members[0].tensor).device
        left = torch.tensor(sorted(set(range(group.count)) - set(masked_experts)), device=device)
        self.alive[group.site] = left
        for member in _router_members(group):
            if not self._is_inside(member.tensor, group):
                original = self.around[member.tensor] = tensor_at(model, member.tensor)
                _set_buffer(model, member.tensor, original.index_select(member.axis, left))
        for path, name, per in group.attributes:
            attribute_path = f"{path}.{name}" if path else name
            if not self._is_inside(attribute_path, group):
                original = self.around[attribute_path] = attribute_at(model, attribute_path)
                set_attribute(model, attribute_path, round(original - (group.count - len(left)) * per))

    def changed_expert_counts(self, unit_path: str) -> tuple[tuple[str, int], ...]:
        """Numbers around the layers of a unit that are others now, which a graph has as literals."""
        return tuple(
            (path, attribute_at(self.program.model, path))
            for path, before in sorted(self.around.items())
            if type(before) is int and is_submodule(path, unit_path)
        )

    def register_hooks(self, groups: Sequence[Group]) -> list[RemovableHandle]:
        """Hooks that follow what is silenced of these layers; `remove` them."""
        hooks: list[RemovableHandle] = []
        for group in groups:
            router, experts = self._router_path(group), module_of(readers(group)[0])
            hooks += self._register_router_narrowing_hooks(group, router)
            module = self.program.model.get_submodule(experts)
            hooks.append(module.register_forward_pre_hook(self._expert_renumbering_hook(group.site), with_kwargs=True))
        return hooks

    def _router_path(self, group: Group) -> str:
        model = self.program.model
        return next(
            p for p in map(module_of, _router_members(group)) if module_role(model.get_submodule(p)) == "router"
        )

    def _is_inside(self, path_inside: str, group: Group) -> bool:
        """Whether it is the router's, which has its own while it is called, or the experts', which stay whole."""
        return any(is_submodule(path_inside, path) for path in (self._router_path(group), module_of(readers(group)[0])))

    def _register_router_narrowing_hooks(self, group: Group, router_path: str) -> list[RemovableHandle]:
        router = self.program.model.get_submodule(router_path)
        rows = [
            (m.tensor.removeprefix(f"{router_path}."), m.axis)
            for m in _router_members(group)
            if is_submodule(m.tensor, router_path)
        ]
        counts = [(name, per) for owner, name, per in group.attributes if owner == router_path]
        originals: dict[str, Any] = {}

        def narrow(_module: nn.Module, _args: Any) -> None:
            left = self.alive.get(group.site)
            if left is None:
                return
            for name, axis in rows:
                store = router._parameters if name in router._parameters else router._buffers
                originals[name], store[name] = store[name], None
                vars(router)[name] = originals[name].index_select(axis, left)
            for name, per in counts:
                originals[name] = getattr(router, name)
                setattr(router, name, round(originals[name] - (group.count - len(left)) * per))

        def widen(_module: nn.Module, _args: Any, _output: Any) -> None:
            for name, _ in rows if originals else ():
                del vars(router)[name]
                store = router._parameters if name in router._parameters else router._buffers
                store[name] = originals[name]
            for name, _ in counts if originals else ():
                setattr(router, name, originals[name])
            originals.clear()

        before = router.register_forward_pre_hook(narrow)
        return [before, router.register_forward_hook(widen, always_call=True)]

    def _expert_renumbering_hook(self, site: str) -> Any:
        def number(value: Any, left: Tensor) -> Any:
            return left[value] if isinstance(value, Tensor) and not value.is_floating_point() else value

        def renumber(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            left = self.alive.get(site)
            if left is None:
                return None
            return tuple(number(x, left) for x in args), {name: number(x, left) for name, x in kwargs.items()}

        return renumber


def _set_buffer(model: nn.Module, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    model.get_submodule(owner)._buffers[name] = value
