"""A model with random weights, from its config alone."""

from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...core.cache import canonical_json_sha256
from ...models.checkpoints.config_bounds import refuse_excessive_config_numbers
from ...models.checkpoints.model_folder import (
    load_tokenizer,
    no_tokenizer,
    read_model_config,
    runs_remote_code_or_refuse,
    tokenizer_files_if_complete,
)
from ...models.checkpoints.origin import Origin
from ...models.checkpoints.source_files import SourceFiles
from ...plugin.context import Context
from ...plugin.interfaces import Source, param

if TYPE_CHECKING:
    from torch import nn


class Config(Source):
    """A model with random weights, from its config alone.

    The seed decides the weights, as the architecture's own initialisation draws them. Tokenizer files that lie
    beside the config are used. For tests of shapes, speed and memory: what such a model says means nothing.

    Source: own.
    Example: model base = config("config.json", seed: 0)
    """

    plain = True
    reads = {"path": ("file",)}

    path: str = param("A config.json, relative to the recipe.", positional=True)
    seed: int = param("Decides the weights.", default=0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = param(
        "What weights are held and computed in; `auto` is what the config says, else float32.", default="auto"
    )

    def resolve(self, ctx: Context) -> Origin:
        path = ctx.folder / Path(self.path).expanduser()
        label = f'config("{self.path}")'
        config = read_model_config(path, label)
        runs_remote_code_or_refuse(config | {"auto_map": {}} if "auto_map" in config else config, label, ctx.settings)
        refuse_excessive_config_numbers(config, None, label)
        dtype = self._dtype(config)
        tokenizers = tokenizer_files_if_complete(path.parent)
        files = SourceFiles(ctx.settings.cache_dir)
        return Origin(
            label=label,
            config=config,
            folder=None,
            identity=canonical_json_sha256(["random", config, self.seed, dtype]),
            build=partial(_build_empty_model, config, dtype),
            load=partial(_build_random_model, config, self.seed, dtype),
            tokenizer=cache(partial(load_tokenizer, path.parent, label)) if tokenizers else no_tokenizer,
            dtype=dtype,
            tokenizer_identity=files.hash_all(tokenizers) if tokenizers else "",
            files=files,
        )

    def _dtype(self, config: dict) -> str:
        declared = config.get("dtype") or config.get("torch_dtype")
        if self.dtype != "auto":
            return self.dtype
        return declared if declared in ("float32", "bfloat16", "float16") else "float32"


def _build_empty_model(config: dict, dtype: str) -> "nn.Module":
    from ...models.checkpoints.checkpoint import build_model_from_config

    return build_model_from_config(config, dtype)


def _build_random_model(config: dict, seed: int, dtype: str) -> "nn.Module":
    from ...models.checkpoints.checkpoint import model_with_random_weights

    return model_with_random_weights(config, seed, dtype)
