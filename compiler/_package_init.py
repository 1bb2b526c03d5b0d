"""effc: a compiler for model optimization."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compiler.core import moved_modules

if TYPE_CHECKING:
    from effc import callbacks

    from .compiler.driver.api import check, compile, load, plan
    from .compiler.driver.optimize import optimize
    from .compiler.plugin.words import (
        clean,
        data,
        lower,
        metrics,
        models,
        prune,
        quantize,
        reft,
        search,
        shed,
        sparsify,
        supernet,
        targets,
        tune,
    )
    from .dsl.syntax.builder import recipe
    from .dsl.syntax.diagnostics import Reject

    __version__: str

__all__ = [
    "Reject",
    "__version__",
    "callbacks",
    "check",
    "clean",
    "compile",
    "data",
    "load",
    "lower",
    "metrics",
    "models",
    "optimize",
    "plan",
    "prune",
    "quantize",
    "recipe",
    "reft",
    "search",
    "shed",
    "sparsify",
    "supernet",
    "targets",
    "tune",
]
_MODULES = {
    **dict.fromkeys(("check", "compile", "load", "plan"), "compiler.driver.api"),
    "optimize": "compiler.driver.optimize",
    "recipe": "dsl.syntax.builder",
    "Reject": "dsl.syntax.diagnostics",
}

if not __debug__:
    _REASON = "effc does not run under `python -O` or PYTHONOPTIMIZE: they leave out its checks of untrusted files"
    if Path(sys.argv[0]).stem not in ("effc", "-m"):
        raise ImportError(_REASON)
    print(f"error: {_REASON}", file=sys.stderr)
    raise SystemExit(5)  # as for all that is wrong with the environment

moved_modules.install()


def __getattr__(name: str) -> Any:
    # Lazy: `effc check` and `effc --help` must not pay for torch, nor for reading package metadata.
    if name == "__version__":
        from importlib.metadata import version

        return version("effc")
    if name == "callbacks":
        return import_module(f".{name}", __name__)
    if name.startswith("_") or (name not in __all__ and find_spec(f"{__name__}.{name}")):
        raise AttributeError(f"module 'effc' has no attribute {name!r}")  # `from effc import plugin` imports it then
    # kinds of words and families of passes, those of plug-ins too
    return getattr(import_module(f".{_MODULES.get(name, 'compiler.plugin.words')}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
