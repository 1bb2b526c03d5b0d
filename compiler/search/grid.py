"""Whether groups of inputs that share a scale divide the inputs of modules."""

from collections.abc import Sequence

from ...dsl.diagnostics import Fault, Reject
from ...dsl.skeleton import Part
from .sparsity import inputs

unfit_group = Fault("unfit-group", "Groups of inputs that are to share a scale don't divide the inputs of a module.")


def check_groups(chosen: Sequence[Part], group: int) -> None:
    """Reject (unfit-group) groups that don't divide the inputs of a module."""
    odd = [part for part in chosen if group and inputs(part) % group]
    if odd:
        more = f", and {len(odd) - 1} more are like that" if len(odd) > 1 else ""
        width = inputs(odd[0])
        fits = max(n for n in range(1, min(group, width) + 1) if width % n == 0)
        raise Reject(
            unfit_group(
                f"{odd[0].path} has {width} inputs, which groups of {group} don't divide{more}",
                help=f"write `group: {fits}`, `group: 0` for one scale an output, or leave it out of `on:`, as in "
                f"`* - {odd[0].path}`",
                argument="group",
            )
        )
