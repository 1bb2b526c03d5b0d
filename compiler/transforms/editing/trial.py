"""The model as it would be after a cut, for as long as a `with` block lasts. Nothing is sliced or copied."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ....dsl.checker.skeleton import Branch
from ...analysis.discovery.bypass import copy_without_branch
from ...ir.unit import graph_code_hash

if TYPE_CHECKING:
    from ...ir.program import Program
    from ...ir.unit import Unit


@contextmanager
def with_units_bound_temporarily(program: "Program", unit_copies: Sequence["Unit"]) -> Iterator[None]:
    """Layers run these graphs, also where they are their own: a layer's own forward is another kind of code."""
    try:
        for unit in unit_copies:
            unit.install_graph_forward(program.model)
        yield
    finally:
        for path in {unit.path for unit in unit_copies} & program.units.keys():
            unit = program.units[path]
            (unit.install_graph_forward if unit.edited else unit.restore_class_forward)(program.model)


def with_branch_skipped(program: "Program", branch: Branch) -> AbstractContextManager[None]:
    """The branch's unit runs a copy of its graph in which the residual add is its other operand."""
    unit = program.units[branch.unit]
    graph = copy_without_branch(unit.graph, branch)
    return with_units_bound_temporarily(program, [replace(unit, graph=graph, key=graph_code_hash(graph), edited=True)])


@contextmanager
def with_layer_skipped(program: "Program", unit_path: str) -> Iterator[None]:
    """The unit returns the hidden states that it was given."""
    module = program.model.get_submodule(unit_path)

    def skip(_module, args, kwargs, output) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = module.register_forward_hook(skip, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
