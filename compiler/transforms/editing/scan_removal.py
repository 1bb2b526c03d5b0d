"""State-space mixers of a program without their scan; analysis/discovery/mixers/scanless.py has what is left of one."""

import copy
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from ...analysis.discovery.mixers.graphs import CACHE, CONV, mixer_graphs
from ...analysis.discovery.mixers.scanless import scanless
from ...ir.layers import leaves
from ...ir.liveness import sweep
from ...ir.program import Program
from ...ir.traced_integers import LAYER_INDICES
from ...ir.unit import Unit, argument_names, code_key
from .rewrite import Rewriter

if TYPE_CHECKING:
    from ....dsl.checker.skeleton import Scan

_WORD = re.compile(r"[A-Za-z_][\w.]*")


def without_scan(program: Program, scan: "Scan") -> Unit:
    """The unit with the mixer opened and the scan left out, all weights as they are; nothing is changed yet."""
    return _spliced(
        program, scan, scanless(mixer_graphs(program)[scan.site], program.model.get_submodule(scan.site)).graph
    )


def drop_scan(program: Program, rewrite: Rewriter, scan: "Scan") -> None:
    """Leave the scan out for good, with all that only it used."""
    mixer = program.model.get_submodule(scan.site)
    plan = scanless(mixer_graphs(program)[scan.site], mixer)
    unit = _spliced(program, scan, plan.narrow)
    program.units[scan.unit] = unit
    program.opaque.pop(scan.site, None)
    for path in plan.dead:
        rewrite.delete(f"{scan.site}.{path}")
    for (tensor, axis), keep in plan.keep.items():
        if not any(f"{tensor}.".startswith(f"{path}.") for path in plan.dead):
            rewrite.narrow(f"{scan.site}.{tensor}", axis, keep)
    rewrite.store(unit)


def _spliced(program: Program, scan: "Scan", inner: fx.Graph) -> Unit:
    """The unit's graph with the mixer's in place of its one node."""
    unit = program.units[scan.unit]
    below = scan.site.removeprefix(f"{scan.unit}.")
    graph = copy.deepcopy(unit.graph)
    node = next(n for n in graph.nodes if n.op == "call_module" and n.target == below)
    mixer = program.model.get_submodule(scan.site)
    given = dict(zip(argument_names(type(mixer)), node.args, strict=False)) | node.kwargs
    made: dict[fx.Node, Any] = {}
    with graph.inserting_before(node):
        for old in inner.nodes:
            if old.op == "placeholder":
                made[old] = given.get(old.target)
            elif old.op == "output":
                node.replace_all_uses_with(fx.map_arg(old.args[0], made.__getitem__))
            else:
                made[old] = _copied(graph, old, made, below, node)
        _share_state(graph, mixer, below, given.get(CACHE), node)
    graph.erase_node(node)
    sweep(graph)
    return replace(unit, graph=graph, key=code_key(graph), edited=True)


def _copied(graph: fx.Graph, old: fx.Node, made: dict[fx.Node, Any], below: str, node: fx.Node) -> fx.Node:
    new = graph.node_copy(old, made.__getitem__)
    if new.op in ("call_module", "get_attr"):
        new.target = f"{below}.{old.target}"
    new.meta = dict(old.meta)
    scope = (*node.meta.get("scope", ()), below)
    new.meta["scope"] = (*scope, *(f"{below}.{path}" for path in old.meta.get("scope", ())))
    if old.meta.get("ints"):
        new.meta["ints"] = tuple((place, value, _below(source, below)) for place, value, source in old.meta["ints"])
    return new


def _below(source: str, below: str) -> str:
    """An expression over attributes below a mixer, as one below its unit; configs are found by scope."""
    return _WORD.sub(lambda m: m[0] if m[0].startswith("config.") else f"{below}.{m[0]}", source)


def _share_state(graph: fx.Graph, mixer: nn.Module, below: str, cache: Any, before: fx.Node) -> None:
    """The convolution, which was traced without one, keeps its state in the unit's cache."""
    for conv in [n for n in graph.nodes if n.meta.get("role") == CONV and n.target is not leaves.causal_conv]:
        x, weight, *rest = conv.args
        bias = rest[0] if rest else conv.kwargs.get("bias")
        name = next(name for name in sorted(LAYER_INDICES) if name in vars(mixer))
        with graph.inserting_before(conv):
            index = graph.get_attr(f"{below}.{name}")
            index.meta |= {"scope": conv.meta["scope"], "shape": None, "dtype": "int"}
            kept = graph.call_function(
                leaves.causal_conv, (cache, x, weight, bias, conv.kwargs.get("activation"), index)
            )
        kept.meta = dict(conv.meta)
        conv.replace_all_uses_with(kept)
        graph.erase_node(conv)
