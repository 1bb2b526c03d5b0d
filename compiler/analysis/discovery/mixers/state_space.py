"""What the state-space mixers of a model hold: groups that may be narrowed, scans that may go, and why not."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .....dsl.checker.skeleton import Group, Scan
from ..dependent_integers import Baked
from .graphs import MixerGraph, mixer_graphs, scans_in
from .groups import Parts, parts_of_mixer
from .scanless import Scanless, scanless

if TYPE_CHECKING:
    from torch import nn

    from ....ir.program import Program


@dataclass(frozen=True)
class StateSpace:
    """refused: (module, reason); `mixers` are all that were looked into, also those of which nothing is known."""

    groups: tuple[Group, ...] = ()
    scans: tuple[Scan, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    mixers: frozenset[str] = frozenset()


def state_space(program: "Program") -> StateSpace:
    groups: list[Group] = []
    scans, refused, looked = [], [], set()
    known: dict[int, tuple[Parts, Scanless | str]] = {}
    for path, found in mixer_graphs(program).items():
        unit = next((u for u in program.units if path.startswith(f"{u}.")), None)
        if unit is None or found.graph is None or not scans_in(found.graph):
            continue
        looked.add(path)
        mixer = program.model.get_submodule(path)
        if id(found.graph) not in known:  # equal mixers share a graph
            parts = parts_of_mixer(found.graph, mixer)
            known[id(found.graph)] = (parts, _without(found, mixer) if parts.understood else "")
        parts, less = known[id(found.graph)]
        groups += [_placed(group, path) for group in parts.groups]
        refused += [(path, why) for why in parts.refused]
        if isinstance(less, str):
            refused += [(path, less)] if less else []
        else:
            scans.append(Scan(path, unit, tuple(_cuts(path, mixer, less))))
    return StateSpace(tuple(groups), tuple(scans), tuple(refused), frozenset(looked))


def _without(found: MixerGraph, mixer: "nn.Module") -> Scanless | str:
    try:
        return scanless(found, mixer)
    except Baked as why:
        return str(why)


def _cuts(path: str, mixer: "nn.Module", less: Scanless):
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters(remove_duplicate=False)}
    for name, shape in shapes.items():
        if any(f"{name}.".startswith(f"{dead}.") for dead in less.dead):
            yield f"{path}.{name}", None
            continue
        left = tuple(len(less.keep.get((name, axis), range(size))) for axis, size in enumerate(shape))
        if left != shape:
            yield f"{path}.{name}", left


def _placed(group: Group, path: str) -> Group:
    def below(module: str) -> str:
        return f"{path}.{module}" if module else path

    return replace(
        group,
        site=path,
        members=tuple(replace(m, tensor=f"{path}.{m.tensor}") for m in group.members),
        attributes=tuple((below(module), name, per) for module, name, per in group.attributes),
    )
