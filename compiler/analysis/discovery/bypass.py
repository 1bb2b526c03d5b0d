"""A unit's graph without one residual branch."""

import copy

from torch import fx

from ....dsl.checker.skeleton import Branch
from ...ir.liveness import bypass_addition, eliminate_dead_code


def node_named(graph: fx.Graph, name: str) -> fx.Node:
    match = next((node for node in graph.nodes if node.name == name), None)
    assert match is not None, f"the graph has no node {name}"
    return match


def other_operand_of_join(graph: fx.Graph, branch: Branch) -> str:
    """The operand of the branch's join that is not the branch."""
    operands = [node.name for node in node_named(graph, branch.join).args[:2] if isinstance(node, fx.Node)]
    assert branch.value in operands, f"{branch.value} is no operand of {branch.join}"
    return operands[1 - operands.index(branch.value)]


def copy_without_branch(graph: fx.Graph, branch: Branch) -> fx.Graph:
    """A copy in which the join is its other operand; what only the branch computed is gone."""
    name = other_operand_of_join(graph, branch)
    graph = copy.deepcopy(graph)
    bypass_addition(node_named(graph, branch.join), node_named(graph, name))
    eliminate_dead_code(graph)
    return graph
