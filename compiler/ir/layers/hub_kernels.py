"""Functions that Hugging Face's `kernels` has wrapped in modules, so that a kernel of the hub can take their place.

transformers needs that package from 5.25 on. effc loads models without kernels of the hub, and a trace reads the
functions as they are written.
"""

from types import FunctionType
from typing import Any

from torch import nn


def unwrap_kernel_module(value: Any) -> Any:
    """The function inside of such a module; anything else as it is."""
    if not isinstance(value, nn.Module) or not hasattr(type(value), "kernel_layer_name"):
        return value
    forward = type(value).forward
    for name, cell in zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True):
        if name == "func" and isinstance(cell.cell_contents, FunctionType):
            return cell.cell_contents
    return value
