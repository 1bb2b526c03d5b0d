"""State-space mixers of a program without their scan; analysis/discovery/mixers/scanless.py has what is left of one."""

import copy
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from ...analysis.discovery.mixers.graphs import CACHE, CONV, mixer_graphs
from ...analysis.discovery.mixers.scanless import graph_without_scan
from ...ir.layers import leaves
from ...ir.liveness import eliminate_dead_code
from ...ir.program import Program
from ...ir.traced_integers import LAYER_INDICES
from ...ir.unit import Unit, graph_code_hash, positional_argument_names
from .rewrite import Rewriter

if TYPE_CHECKING:
    from ....dsl.checker.skeleton import Scan

_WORD = re.compile(r"[A-Za-z_][\w.]*")


def unit_copy_without_scan(program: Program, scan: "Scan") -> Unit:
    """The unit with the mixer opened and the scan left out, all weights as they are; nothing is changed yet."""
    return _inline_mixer_graph(
        program,
        scan,
        graph_without_scan(mixer_graphs(program)[scan.site], program.model.get_submodule(scan.site)).graph,
    )


def drop_scan(program: Program, rewriter: Rewriter, scan: "Scan") -> None:
    """Leave the scan out for good, with all that only it used."""
    mixer = program.model.get_submodule(scan.site)
    plan = graph_without_scan(mixer_graphs(program)[scan.site], mixer)
    unit = _inline_mixer_graph(program, scan, plan.narrow)
    program.units[scan.unit] = unit
    program.opaque.pop(scan.site, None)
    for path in plan.dead:
        rewriter.delete(f"{scan.site}.{path}")
    for (tensor, axis), keep in plan.keep.items():
        if not any(f"{tensor}.".startswith(f"{path}.") for path in plan.dead):
            rewriter.narrow(f"{scan.site}.{tensor}", axis, keep)
    rewriter.bind_and_record_edited_unit(unit)


def _inline_mixer_graph(program: Program, scan: "Scan", mixer_graph: fx.Graph) -> Unit:
    """The unit's graph with the mixer's in place of its one node."""
    unit = program.units[scan.unit]
    mixer_path = scan.site.removeprefix(f"{scan.unit}.")
    graph = copy.deepcopy(unit.graph)
    node = next(n for n in graph.nodes if n.op == "call_module" and n.target == mixer_path)
    mixer = program.model.get_submodule(scan.site)
    arguments = dict(zip(positional_argument_names(type(mixer)), node.args, strict=False)) | node.kwargs
    copies: dict[fx.Node, Any] = {}
    with graph.inserting_before(node):
        for old in mixer_graph.nodes:
            if old.op == "placeholder":
                copies[old] = arguments.get(old.target)
            elif old.op == "output":
                node.replace_all_uses_with(fx.map_arg(old.args[0], copies.__getitem__))
            else:
                copies[old] = _copy_node_into_unit(graph, old, copies, mixer_path, node)
        _make_convolutions_use_cache(graph, mixer, mixer_path, arguments.get(CACHE))
    graph.erase_node(node)
    eliminate_dead_code(graph)
    return replace(unit, graph=graph, key=graph_code_hash(graph), edited=True)


def _copy_node_into_unit(
    unit_graph: fx.Graph, mixer_node: fx.Node, copy_by_node: dict[fx.Node, Any], mixer_path: str, call_node: fx.Node
) -> fx.Node:
    new = unit_graph.node_copy(mixer_node, copy_by_node.__getitem__)
    if new.op in ("call_module", "get_attr"):
        new.target = f"{mixer_path}.{mixer_node.target}"
    new.meta = dict(mixer_node.meta)
    scope = (*call_node.meta.get("scope", ()), mixer_path)
    new.meta["scope"] = (*scope, *(f"{mixer_path}.{path}" for path in mixer_node.meta.get("scope", ())))
    if mixer_node.meta.get("ints"):
        new.meta["ints"] = tuple(
            (literal_path, value, _unit_expression(source, mixer_path))
            for literal_path, value, source in mixer_node.meta["ints"]
        )
    return new


def _unit_expression(source: str, mixer_path: str) -> str:
    """An expression over attributes below a mixer, as one below its unit; configs are found by scope."""
    return _WORD.sub(lambda m: m[0] if m[0].startswith("config.") else f"{mixer_path}.{m[0]}", source)


def _make_convolutions_use_cache(unit_graph: fx.Graph, mixer: nn.Module, mixer_path: str, cache_node: Any) -> None:
    """The convolution, which was traced without one, keeps its state in the unit's cache."""
    for conv in [n for n in unit_graph.nodes if n.meta.get("role") == CONV and n.target is not leaves.causal_conv]:
        x, weight, *operands = conv.args
        bias = operands[0] if operands else conv.kwargs.get("bias")
        name = next(name for name in sorted(LAYER_INDICES) if name in vars(mixer))
        with unit_graph.inserting_before(conv):
            index = unit_graph.get_attr(f"{mixer_path}.{name}")
            index.meta |= {"scope": conv.meta["scope"], "shape": None, "dtype": "int"}
            cached_conv = unit_graph.call_function(
                leaves.causal_conv, (cache_node, x, weight, bias, conv.kwargs.get("activation"), index)
            )
        cached_conv.meta = dict(conv.meta)
        conv.replace_all_uses_with(cached_conv)
        unit_graph.erase_node(conv)
