"""effc: a compiler for model optimization."""

__all__ = ["__version__", "check", "compile", "load", "plan"]  # noqa: F822 (__getattr__ has them)


def __getattr__(name: str):
    # Lazy: `effc check` and `effc --help` must not pay for torch, nor for reading package metadata.
    if name == "__version__":
        from importlib.metadata import version

        return version("effc")
    if name in __all__:
        from .compiler import api

        return getattr(api, name)
    raise AttributeError(f"module 'effc' has no attribute {name!r}")
