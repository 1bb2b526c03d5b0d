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


def name_of(module: nn.Module) -> str:
    """The name of the class of a module that was put in. Asserts that it has one."""
    name = next((name for name, kind in CLASSES.items() if kind is type(module)), "")
    assert name, f"{type(module).__name__} is not in ir/layers/swap_table.py, so a stored artifact could not name it"
    return name
