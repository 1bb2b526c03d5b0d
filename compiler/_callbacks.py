"""Callbacks for training loops of others, importable as `effc.callbacks`: docs/python-api.md."""

from typing import Any

from .compiler.transforms.training.zero_masks import KeepZeros

__all__ = ["KeepZeros"]  # the other one needs Lightning


def __getattr__(name: str) -> Any:
    if name == "LightningKeepZeros":  # where Lightning is installed
        from .compiler.transforms.training.lightning_callbacks import LightningKeepZeros

        return LightningKeepZeros
    raise AttributeError(f"module 'effc.callbacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["KeepZeros", "LightningKeepZeros"]
