"""effc: a compiler for model optimization."""

from importlib import metadata as _metadata

__all__ = ["__version__", "check", "compile", "load", "plan"]  # noqa: F822 (__getattr__ has them)
__version__ = _metadata.version("effc")


def __getattr__(name: str):
    # Lazy: `effc check` and `effc --help` must not pay for torch.
    if name in __all__:
        from .compiler import api

        return getattr(api, name)
    raise AttributeError(f"module 'effc' has no attribute {name!r}")
