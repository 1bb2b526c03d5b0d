"""Where a model comes from, before and after its weights are read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Origin:
    """A resolved model source.

    label       as a person would call it: `hf("org/name")`, `zoo("tiny-llama")`
    config      the config as plain JSON; with `architectures`, so that the class is known
    folder      where safetensors, config and tokenizer lie; None for random weights and modules
    identity    sha256 over what decides the weights: file hashes or (config, seed)
    build       makes the module; inside a `torch.device("meta")` context it has no weights
    load        makes the module with its weights, in `dtype`, on the CPU
    tokenizer   the tokenizer, or None where the source has none
    """

    label: str
    config: dict[str, Any]
    folder: Path | None
    identity: str
    build: Callable[[], "torch.nn.Module"] = field(repr=False)
    load: Callable[[], "torch.nn.Module"] = field(repr=False)
    tokenizer: Callable[[], Any] = field(repr=False)
    dtype: str = "float32"
