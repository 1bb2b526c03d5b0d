"""The classes that stored edits may put into a model, by the names that they are stored under.

An artifact is untrusted: a name that is not here is refused, and nothing is imported because a file says so. A class
that a pass puts into models gets a line here.
"""

from torch import nn

from .linear import KernelLinear
from .reft import Reft

CLASSES: dict[str, type[nn.Module]] = {
    "KernelLinear": KernelLinear,
    "Reft": Reft,
    "compiler.lowering.lowered:KernelLinear": KernelLinear,  # 8d012cb wrote the last of these
}


def registered_name(kind: type[nn.Module]) -> str:
    """The name of a class of modules that are put in, the first of several. Asserts that it has one."""
    name = next((name for name, other in CLASSES.items() if other is kind), "")
    assert name, f"{kind.__name__} is not in ir/layers/swap_table.py, so a stored artifact could not name it"
    return name
