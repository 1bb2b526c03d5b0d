"""Callbacks of Lightning; importing this module imports Lightning."""

import sys
from importlib import import_module
from typing import Any

from .zero_masks import ZeroMasks

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # of one release, with classes of their own


def _import_lightning_callback_class() -> Any:
    """`Callback` of the package whose Trainer is in use, or that is installed."""
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return import_module(name).Callback
        except ImportError as error:
            missing = error
    raise ImportError("Lightning is not installed: `pip install pytorch-lightning`") from missing


Callback: Any = _import_lightning_callback_class()


class LightningKeepZeros(Callback):
    """Callback of Lightning: zeros of a sparse model stay zero while it is trained, as `KeepZeros` of transformers.

        Trainer(callbacks=[effc.callbacks.LightningKeepZeros()], ...).fit(module, loader)

    Zeros are those that the module's weights have when training begins, after those of `ckpt_path` are loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._masks = ZeroMasks()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._masks.record_zeros_and_mask_gradients(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._masks.zero_masked_weights()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._masks.remove_hooks()
