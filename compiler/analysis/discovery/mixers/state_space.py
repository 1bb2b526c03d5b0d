"""State-space mixers of a model: groups that may be narrowed, scans that may go, and why not."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .....dsl.checker.skeleton import Group, Scan
from ..dependent_integers import Baked
from .graphs import MixerGraph, mixer_graphs, scan_nodes
from .groups import Parts, parts_of_mixer
from .scanless import ScanFreeMixer, graph_without_scan

if TYPE_CHECKING:
    from torch import nn

    from ....ir.program import Program


@dataclass(frozen=True)
class StateSpace:
    """rejected: (module, reason); `mixers` are all that were looked into, also those of which nothing is known."""

    groups: tuple[Group, ...] = ()
    scans: tuple[Scan, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    mixers: frozenset[str] = frozenset()


def find_state_spaces(program: "Program") -> StateSpace:
    groups: list[Group] = []
    scans, refusals, looked = [], [], set()
    known: dict[int, tuple[Parts, ScanFreeMixer | str]] = {}
    for path, mixer_graph in mixer_graphs(program).items():
        unit = next((u for u in program.units if path.startswith(f"{u}.")), None)
        if unit is None or mixer_graph.graph is None or not scan_nodes(mixer_graph.graph):
            continue
        looked.add(path)
        mixer = program.model.get_submodule(path)
        if id(mixer_graph.graph) not in known:  # equal mixers share a graph
            parts = parts_of_mixer(mixer_graph.graph, mixer)
            known[id(mixer_graph.graph)] = (
                parts,
                _scan_free_mixer_or_reason(mixer_graph, mixer) if parts.understood else "",
            )
        parts, less = known[id(mixer_graph.graph)]
        groups += [group.renamed(partial(_join_paths, path)) for group in parts.groups]
        refusals += [(path, reason) for reason in parts.rejected]
        if isinstance(less, str):
            refusals += [(path, less)] if less else []
        else:
            scans.append(Scan(path, unit, tuple(_changed_shapes_without_scan(path, mixer, less))))
    return StateSpace(tuple(groups), tuple(scans), tuple(refusals), frozenset(looked))


def _scan_free_mixer_or_reason(mixer_graph: MixerGraph, mixer: "nn.Module") -> ScanFreeMixer | str:
    try:
        return graph_without_scan(mixer_graph, mixer)
    except Baked as reason:
        return str(reason)


def _changed_shapes_without_scan(
    path: str, mixer: "nn.Module", scan_free: ScanFreeMixer
) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters(remove_duplicate=False)}
    for name, shape in shapes.items():
        if any(f"{name}.".startswith(f"{dead}.") for dead in scan_free.dead):
            yield f"{path}.{name}", None
            continue
        left = tuple(len(scan_free.keep.get((name, axis), range(size))) for axis, size in enumerate(shape))
        if left != shape:
            yield f"{path}.{name}", left


def _join_paths(mixer: str, inner: str) -> str:
    return f"{mixer}.{inner}" if inner else mixer
