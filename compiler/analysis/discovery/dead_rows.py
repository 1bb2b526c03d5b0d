"""Rows of weights that nobody reads any more, once a graph has lost a part."""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import fx, nn

from ...ir.capture.refresh import set_nested_argument
from ...ir.graphs import target_name
from .dependent_integers import Baked, Need, literal_needs
from .labelling import Labelling, tensors_in

_UNEVEN = ("chunk", "tensor_split", "unflatten", "repeat_interleave")  # parts of sizes that no literal says


def is_unread_by_label(labelling: Labelling, output_labels: np.ndarray) -> np.ndarray:
    """For each label whether nothing reads it: no column of a product, no attention, nothing of which little is known.

    output_labels   labels of what the graph returns
    """
    root = labelling.component_roots()
    read = np.zeros(len(root), bool)
    read_labels = [claim.labels for claim in labelling.claims if claim.reads]
    read_labels += [labels for attention in labelling.attentions for labels in (attention.q, attention.kv)]
    read_labels += [labels for labels, _ in (*labelling.blocked, *labelling.chosen)]
    for labels in (*read_labels, output_labels):
        read[root[labels]] = True
    dead = ~read[root]
    dead[:2] = False  # NOTHING and STREAM
    return dead


def live_indices_by_tensor_axis(labelling: Labelling, is_dead_by_label: np.ndarray) -> dict[tuple[str, int], list[int]]:
    """(tensor, axis) -> the indices that are still read, where some are not."""
    live = {}
    for claim in labelling.claims:
        left = np.flatnonzero(~is_dead_by_label[claim.labels])
        if not claim.reads and len(left) < len(claim.labels):
            live[claim.tensor, claim.axis] = left.tolist()
    return {axis: left for axis, left in live.items() if left}


def copy_with_narrowed_literals(
    graph: fx.Graph, labelling: Labelling, is_dead_by_label: np.ndarray, root: nn.Module
) -> fx.Graph:
    """A copy whose literals have the values that the kept rows need, and follow no attribute any more. Raises Baked."""
    _refuse_dead_labels_in_divisions(labelling, is_dead_by_label)
    needs = [
        need for need in literal_needs(labelling, torch.from_numpy(is_dead_by_label), root) if need.value != need.needed
    ]
    graph = copy.deepcopy(graph)
    nodes = {node.name: node for node in graph.nodes}
    for need in needs:
        _write_needed_literal(nodes[need.node.name], need)
    return graph


def _write_needed_literal(node: fx.Node, need: Need) -> None:
    set_nested_argument(node, need.location.split("."), need.needed)
    node.meta["ints"] = tuple(entry for entry in node.meta.get("ints", ()) if entry[0] != need.location)


def _refuse_dead_labels_in_divisions(labelling: Labelling, is_dead_by_label: np.ndarray) -> None:
    for node in labelling.values:
        if target_name(node) in _UNEVEN and node.op != "placeholder":
            divided = node.args[0]
            assert isinstance(divided, fx.Node), f"{node.name} divides no value"
            for x in tensors_in(labelling.values[divided]):
                if is_dead_by_label[x.numpy()].any():
                    raise Baked(f"`{target_name(node)}` divides what nobody else needs")


def matmul_modules_with_fewer_users(before: fx.Graph, after: fx.Graph) -> Iterator[str]:
    """Modules that multiply matrices, of whose results less is read than before."""
    users = {node.name: len(node.users) for node in before.nodes}
    for node in after.nodes:
        if 0 < len(node.users) < users.get(node.name, 0):
            source = node
            while source.op in ("call_function", "call_method") and target_name(source) in _PARTED:
                source = source.all_input_nodes[0]
            if source.op == "call_module" and source.meta.get("role") in ("linear", "conv"):
                yield source.target


_PARTED = tuple(
    """
    split chunk tensor_split split_with_sizes getitem view reshape transpose unbind narrow permute
    unflatten
    """.split()
)
