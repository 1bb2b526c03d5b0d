"""Outputs of an encoder: hidden states of its last layer, and one pooled vector per row."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.pretrained import is_pretrained
from ..checkpoints.sentence_encoder import MODULES, no_pooling, read_module_json, read_sentence_modules
from .forward import evaluating, main_tensor_of_output, memory_batches
from .inputs import forward_args_and_kwargs, non_padding_mask, pad_id_of
from .packed_inputs import packed_input_parts

Pooling = Callable[[Tensor, Tensor], Tensor]  # states [b, t, d], which of them count [b, t] -> [b, d]


@dataclass(frozen=True)
class States:
    """Of some rows: `tokens` [b, t, d], which of them count [b, t], and the vector of each row, `pooled` [b, d]."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


def pooled_hidden_states(model: nn.Module, rows: Tensor, pooling: str) -> States:
    """Hidden states without a cache; of a model with a head, those below it. Images give patches, maps their pixels."""
    encoder = model.base_model if is_pretrained(model) else model
    output = _output_below_head(model, encoder, rows)
    tokens = main_tensor_of_output(output)
    if tokens.dim() == 2:
        tokens = tokens[:, None]
    elif tokens.dim() > 3:
        tokens = tokens.flatten(2).transpose(1, 2)  # [b, c, h, w] -> [b, h * w, c]
    attended = _attended_mask(encoder, rows, tokens)
    if pooling == "own":
        return States(tokens, attended, _model_states(output, type(model).__name__))
    return States(tokens, attended, POOLINGS[pooling](tokens, attended))


def _output_below_head(model: nn.Module, encoder: nn.Module, rows: Tensor) -> Any:
    """Output of the model below a head. One that takes other inputs, as SpeechT5's, is run by the model itself."""
    runs = encoder if packed_input_parts(encoder) == packed_input_parts(model) else model
    args, kwargs = forward_args_and_kwargs(runs, rows)
    outputs: list[Any] = []
    handle = encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        runs(*args, **kwargs)
    finally:
        handle.remove()
    return outputs[-1]


def pooled_state_batches(model: nn.Module, rows: Tensor, pooling: str) -> Iterator[States]:
    """States of all rows, in batches that are a function of shapes alone."""
    with evaluating(model):
        for batch in memory_batches(model, rows):
            yield pooled_hidden_states(model, batch, pooling)


def _attended_mask(model: nn.Module, rows: Tensor, tokens: Tensor) -> Tensor:
    if rows.shape[:2] == tokens.shape[:2]:
        return non_padding_mask(rows.to(tokens.device), pad_id_of(model))
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _model_states(output: Any, model_name: str) -> Tensor:
    pooled = output.get("pooler_output") if isinstance(output, Mapping) else None
    if pooled is None:
        raise no_pooling(f"{model_name} pools nothing itself", help="`pooling: mean`, or another").rejection()
    return pooled.flatten(1)


# -- one vector of many --------------------------------------------------------------------------------------


def _mean(tokens: Tensor, attended: Tensor) -> Tensor:
    weights = attended[..., None].to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1)


def _max(tokens: Tensor, attended: Tensor) -> Tensor:
    return tokens.masked_fill(~attended[..., None], float("-inf")).amax(1)


def _last_attended(tokens: Tensor, attended: Tensor) -> Tensor:
    return tokens[torch.arange(len(tokens), device=tokens.device), attended.sum(1) - 1]


POOLINGS: dict[str, Pooling] = {
    "mean": _mean,
    "first": lambda tokens, _: tokens[:, 0],
    "last": _last_attended,
    "max": _max,
}

# What sentence-transformers calls them: flags of an older file, words of a newer one.
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
_WORDS = {"mean": "mean", "cls": "first", "lasttoken": "last", "max": "max"}
_MODULES = ("Transformer", "Pooling", "Normalize")


def resolve_pooling_name(folder: Path | None, requested: str) -> str:
    """The pooling that is asked for; for "auto" the one that a folder of sentence-transformers names, else the mean."""
    if requested != "auto":
        return requested
    if folder is None or not (folder / MODULES).is_file():
        return "mean"
    path = _checked_pooling_config_path(folder)
    config = read_module_json(path)
    poolings = [name for flag, name in _FLAGS.items() if config.get(flag) is True]
    word = config.get("pooling_mode")
    poolings = poolings or [_WORDS[word]] if word in _WORDS else poolings
    if len(poolings) != 1:
        raise no_pooling(
            f"{path} names {len(poolings)} ways of pooling that effc knows",
            help=f"write `pooling:` with one of {', '.join(POOLINGS)}",
        ).rejection()
    return poolings[0]


def _checked_pooling_config_path(folder: Path) -> Path:
    """The config of a folder's pooling; Reject where what follows the transformer is more than that."""
    kinds = dict(read_sentence_modules(folder))
    unknown = [kind for kind in kinds if kind not in _MODULES]
    if unknown or "Pooling" not in kinds:
        fact = f"has a module {unknown[0]}, which effc does not run" if unknown else "names no pooling"
        raise no_pooling(
            f"{folder / MODULES} {fact}", help=f"write `pooling:` with one of {', '.join(POOLINGS)}"
        ).rejection()
    path = folder / kinds["Pooling"] / "config.json"
    if not path.is_file():
        raise no_pooling(
            f"{folder / MODULES} names a pooling that is not there", help="fetch the folder again"
        ).rejection()
    return path
