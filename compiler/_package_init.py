"""effc: a compiler for model optimization."""

from typing import TYPE_CHECKING

from .compiler.core import moved_modules

if TYPE_CHECKING:
    from .compiler.driver.api import check, compile, load, plan

    __version__: str

__all__ = ["__version__", "check", "compile", "load", "plan"]

moved_modules.install()


def __getattr__(name: str):
    # Lazy: `effc check` and `effc --help` must not pay for torch, nor for reading package metadata.
    if name == "__version__":
        from importlib.metadata import version

        return version("effc")
    if name in __all__:
        from .compiler.driver import api

        return getattr(api, name)
    raise AttributeError(f"module 'effc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
