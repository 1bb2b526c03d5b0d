"""Importing this registers every kernel as `torch.ops.effc.NAME`."""

import importlib
import pkgutil

from . import __path__ as folders
from .kernel import KERNELS
from .packed_linear import LINEARS

for module in pkgutil.iter_modules(folders):
    if not module.ispkg and module.name != "ops" and not module.name.startswith("libeffc"):
        importlib.import_module(f".{module.name}", __package__)

__all__ = ["KERNELS", "LINEARS"]
