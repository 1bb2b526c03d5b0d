"""Whether groups of inputs that share a scale divide the inputs of modules."""

from collections.abc import Sequence

from ....dsl.checker.inputs import group_size_diagnostic
from ....dsl.checker.skeleton import Part
from ....dsl.syntax.diagnostics import Reject


def refuse_indivisible_groups(selected: Sequence[Part], group_size: int) -> None:
    """Reject (unfit-group) groups that don't divide the inputs of a module."""
    if fault := group_size_diagnostic(selected, group_size):
        raise Reject(fault)
