"""A state-space mixer without its scan: the convolved input goes on as it is, gate and norm stay.

Source: Mamba-Shedder (Munoz et al. 2025, arXiv 2501.17088): y = x after convolution and activation. That what only
fed the scan goes, too, rows of projections and channels of the convolution: own.
"""

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import fx, nn

from ....ir.graphs import referenced_paths
from ....ir.liveness import eliminate_dead_code
from ..dead_rows import copy_with_narrowed_literals, is_unread_by_label, live_indices_by_tensor_axis
from ..labels import tensors_in
from .graphs import MixerGraph, scan_nodes
from .mixer_labels import label_mixer, source_parameter


@dataclass(frozen=True)
class ScanFreeMixer:
    """A mixer without its scan, paths below it.

    graph   without a cache, every tensor still as wide as it was
    narrow  the same with the widths that `keep` leaves
    keep    (tensor, axis) -> the indices that are still read
    dead    parameters and modules that nothing reads
    """

    graph: fx.Graph
    narrow: fx.Graph
    keep: dict[tuple[str, int], list[int]]
    dead: tuple[str, ...]


def graph_without_scan(mixer_graph: MixerGraph, mixer: nn.Module) -> ScanFreeMixer:
    """Raises Baked where what the scan alone needs can't be told from the rest."""
    assert mixer_graph.graph is not None, mixer_graph.reason
    graph = copy.deepcopy(mixer_graph.graph)
    (scan,) = scan_nodes(graph)
    scan.replace_all_uses_with(_scan_input(graph, scan))
    eliminate_dead_code(graph)
    labelling = label_mixer(graph, mixer)
    *_, last = labelling.values.values()
    dead_labels = is_unread_by_label(labelling, np.concatenate([np.unique(x.numpy()) for x in tensors_in(last)]))
    dead = tuple(_no_longer_used_paths(mixer, mixer_graph.graph, graph))
    return ScanFreeMixer(
        graph,
        copy_with_narrowed_literals(graph, labelling, dead_labels, mixer),
        live_indices_by_tensor_axis(labelling, dead_labels),
        dead,
    )


def skip_parameter_path(mixer_graph: MixerGraph) -> str | None:
    """The parameter, below the mixer, by which the scan hands its input on besides."""
    assert mixer_graph.graph is not None, mixer_graph.reason
    (scan,) = scan_nodes(mixer_graph.graph)
    return source_parameter(scan.kwargs.get("D"))


def _scan_input(graph: fx.Graph, scan: fx.Node) -> fx.Node:
    """Input of the scan, gated where the scan itself was to do that."""
    x, gate = scan.args[0], scan.kwargs.get("z")
    assert isinstance(x, fx.Node), f"{scan.name} scans no value"
    if gate is None:
        return x
    with graph.inserting_before(scan):
        opened_gate = graph.call_function(F.silu, (gate,))
        gated = graph.call_function(operator.mul, (x, opened_gate))
    for node in (opened_gate, gated):
        node.meta |= {key: scan.meta[key] for key in ("scope", "shape", "dtype")}
    return gated


def _no_longer_used_paths(mixer: nn.Module, before: fx.Graph, after: fx.Graph) -> Iterator[str]:
    """Modules and parameters that the scan alone used."""
    used_before, used_after = referenced_paths(before), referenced_paths(after)
    unused: list[str] = []
    for path in sorted(used_before - used_after, key=len):
        owner = path
        while owner and not _is_used(owner, used_after):
            path, owner = owner, owner.rpartition(".")[0]
        if not _is_used(path, used_after) and path not in unused:
            unused.append(path)
            yield path


def _is_used(path: str, used_paths: set[str]) -> bool:
    return any(u == path or u.startswith(f"{path}.") or path.startswith(f"{u}.") for u in used_paths)
