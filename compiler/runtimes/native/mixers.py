"""A program's flat graph with its state-space mixers opened: what was one node is the graph of its prefill.

With a cache such a mixer branches on the state that it finds there, so capture keeps it whole. The engine has the
state in its steps, and reads the mixer as it is without one.
"""

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ...analysis.discovery.mixers.graphs import MixerGraph, mixer_graphs
from ...ir.capture.capture import full_model_unit
from ...ir.program import Program
from ...ir.unit import positional_argument_names
from . import recurrences


def copy_with_inlined_mixers(program: Program) -> fx.Graph:
    """A copy of the flat graph; mixers that could not be opened stay the node that they were."""
    opened = mixer_graphs(program) if program.opaque else {}
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in full_model_unit(program).graph.nodes:
        mixer = opened.get(str(node.target)) if node.op == "call_module" else None
        if mixer is None or mixer.graph is None:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        else:
            copies[node] = _inline_mixer(graph, node, mixer, program, copies)
    return graph


def _inline_mixer(
    graph: fx.Graph, node: fx.Node, mixer: MixerGraph, program: Program, outer: dict[fx.Node, Any]
) -> Any:
    """The mixer's nodes at the end of the graph, on what the one node was given; their value."""
    names = positional_argument_names(type(program.model.get_submodule(mixer.path)))
    args, kwargs = fx.map_arg((node.args, node.kwargs), outer.__getitem__)
    arguments = dict(zip(names, args, strict=False)) | kwargs
    copies: dict[fx.Node, Any] = {}
    assert mixer.graph is not None, mixer.reason
    closed = _unrolled_recurrences(program.model.get_submodule(mixer.path), mixer.graph)
    for old in mixer.graph.nodes:
        if old in closed:
            copies[old] = _call_recurrence(graph, closed[old], copies, mixer.path)
        elif old.op == "placeholder":
            copies[old] = arguments.get(old.target)
        elif old.op == "output":
            return fx.map_arg(old.args[0], copies.__getitem__)
        else:
            copies[old] = _copy_mixer_node(graph, old, copies, mixer.path)
    raise AssertionError(f"the graph of {mixer.path} has no output")


@dataclass(frozen=True)
class _Closed:
    """Nodes of a part that is one step of the engine: what it is given, and the one node that others read."""

    name: str
    operands: tuple[fx.Node, ...]
    result: fx.Node


def _unrolled_recurrences(module: nn.Module, graph: fx.Graph) -> dict[fx.Node, _Closed]:
    """The nodes of every part whose loop over the sample's tokens was traced turn by turn."""
    closed_parts: dict[fx.Node, _Closed] = {}
    for name, part in module.named_children():
        inside = [node for node in graph.nodes if name in node.meta.get("scope", ())]
        results = [node for node in inside if any(user not in inside for user in node.users)]
        if len(results) != 1 or recurrences.recognise_rg_lru(part) is None:
            continue
        outside = dict.fromkeys(x for node in inside for x in node.all_input_nodes if x not in inside)
        rows = [x for x in outside if x.meta.get("shape") == results[0].meta.get("shape")]
        state_inputs = [x for x in outside if x.op == "placeholder" and x not in rows]
        if len(rows) == len(state_inputs) == 1:
            closed_parts |= dict.fromkeys(inside, _Closed(name, (*rows, *state_inputs), results[0]))
    return closed_parts


def _call_recurrence(graph: fx.Graph, recurrence: _Closed, copies: dict[fx.Node, Any], path: str) -> fx.Node:
    if recurrence.result in copies:
        return copies[recurrence.result]
    call = graph.call_module(f"{path}.{recurrence.name}", tuple(copies[x] for x in recurrence.operands))
    call.meta = {**recurrence.result.meta, "scope": (path, f"{path}.{recurrence.name}"), "role": None}
    copies[recurrence.result] = call
    return call


def _copy_mixer_node(graph: fx.Graph, old: fx.Node, copies: dict[fx.Node, Any], path: str) -> fx.Node:
    new = graph.node_copy(old, copies.__getitem__)
    if new.op in ("call_module", "get_attr"):
        new.target = f"{path}.{old.target}"
    new.meta = dict(old.meta)
    new.meta["scope"] = (path, *(f"{path}.{inner}" for inner in old.meta.get("scope", ()) if inner))
    return new
