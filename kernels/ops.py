"""Importing this registers every kernel as `torch.ops.effc.NAME`."""

import importlib
import pkgutil

from . import __path__ as folders
from .kernel import KERNELS
from .packed_linear import LINEARS

for found in pkgutil.iter_modules(folders):
    if not found.ispkg and found.name != "ops" and not found.name.startswith("libeffc"):
        importlib.import_module(f".{found.name}", __package__)

__all__ = ["KERNELS", "LINEARS"]
