"""What an encoder says of rows: hidden states of its last layer, and one vector for each row made of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Reject
from ..checkpoints.pretrained import is_pretrained
from ..checkpoints.sentence_encoder import MODULES, json_of, modules, no_pooling
from .forward import batches, evaluating, main_output
from .inputs import arguments, padding, written

Pooling = Callable[[Tensor, Tensor], Tensor]  # states [b, t, d], which of them count [b, t] -> [b, d]


@dataclass(frozen=True)
class States:
    """Of some rows: `tokens` [b, t, d], which of them count [b, t], and the vector of each row, `pooled` [b, d]."""

    tokens: Tensor
    counted: Tensor
    pooled: Tensor


def states(model: nn.Module, rows: Tensor, pooling: str) -> States:
    """Hidden states without a cache; of a model with a head, those below it. Images give patches, maps their pixels."""
    below = model.base_model if is_pretrained(model) else model
    args, given = arguments(below, rows)
    output = below(*args, **given)
    tokens = main_output(output)
    if tokens.dim() == 2:
        tokens = tokens[:, None]
    elif tokens.dim() > 3:
        tokens = tokens.flatten(2).transpose(1, 2)  # [b, c, h, w] -> [b, h * w, c]
    counted = _counted(below, rows, tokens)
    if pooling == "own":
        return States(tokens, counted, _own(output, type(model).__name__))
    return States(tokens, counted, POOLINGS[pooling](tokens, counted))


def every_state(model: nn.Module, rows: Tensor, pooling: str) -> Iterator[States]:
    """The same for all rows, in batches that are a function of shapes alone."""
    with evaluating(model):
        for batch in batches(model, rows):
            yield states(model, batch, pooling)


def _counted(model: nn.Module, rows: Tensor, tokens: Tensor) -> Tensor:
    if rows.shape[:2] == tokens.shape[:2]:
        return written(rows.to(tokens.device), padding(model))
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _own(output: Any, name: str) -> Tensor:
    found = output.get("pooler_output") if isinstance(output, Mapping) else None
    if found is None:
        raise Reject(no_pooling(f"{name} pools nothing itself", help="`pooling: mean`, or another"))
    return found.flatten(1)


# -- one vector of many --------------------------------------------------------------------------------------


def _mean(tokens: Tensor, counted: Tensor) -> Tensor:
    kept = counted[..., None].to(tokens.dtype)
    return (tokens * kept).sum(1) / kept.sum(1)


def _max(tokens: Tensor, counted: Tensor) -> Tensor:
    return tokens.masked_fill(~counted[..., None], float("-inf")).amax(1)


def _last(tokens: Tensor, counted: Tensor) -> Tensor:
    return tokens[torch.arange(len(tokens), device=tokens.device), counted.sum(1) - 1]


POOLINGS: dict[str, Pooling] = {"mean": _mean, "first": lambda tokens, _: tokens[:, 0], "last": _last, "max": _max}

# What sentence-transformers calls them: flags of an older file, words of a newer one.
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}
_WORDS = {"mean": "mean", "cls": "first", "lasttoken": "last", "max": "max"}
_MODULES = ("Transformer", "Pooling", "Normalize")


def pooling_of(folder: Path | None, asked: str) -> str:
    """The pooling that is asked for; for "auto" the one that a folder of sentence-transformers names, else the mean."""
    if asked != "auto":
        return asked
    if folder is None or not (folder / MODULES).is_file():
        return "mean"
    path = _pooling_path(folder)
    told = json_of(path)
    found = [name for flag, name in _FLAGS.items() if told.get(flag) is True]
    word = told.get("pooling_mode")
    found = found or [_WORDS[word]] if word in _WORDS else found
    if len(found) != 1:
        raise Reject(
            no_pooling(
                f"{path} names {len(found)} ways of pooling that effc knows",
                help=f"write `pooling:` with one of {', '.join(POOLINGS)}",
            )
        )
    return found[0]


def _pooling_path(folder: Path) -> Path:
    """The config of a folder's pooling; Reject where what follows the transformer is more than that."""
    kinds = dict(modules(folder))
    odd = [kind for kind in kinds if kind not in _MODULES]
    if odd or "Pooling" not in kinds:
        fact = f"has a module {odd[0]}, which effc does not run" if odd else "names no pooling"
        raise Reject(
            no_pooling(f"{folder / MODULES} {fact}", help=f"write `pooling:` with one of {', '.join(POOLINGS)}")
        )
    place = folder / kinds["Pooling"] / "config.json"
    if not place.is_file():
        raise Reject(no_pooling(f"{folder / MODULES} names a pooling that is not there", help="fetch the folder again"))
    return place
