"""Rows of data in memory: texts and token ids that a Python program has."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.options import invalid_option
from ..core.quantity import with_article
from .windows import encode, no_tokenizer, start_token_id, token_windows

HELD_OUT = 10  # of so many rows the last one
FORMS = "give texts (a list, or a column of a data set), or a tensor of token ids [rows, length]"

Rows = str | Iterable[str] | Tensor


def rows_by_name(
    data: Rows | Mapping[str, Rows] | None, tokenizer: Any, length: int, samples: int
) -> dict[str, Tensor]:
    """Rows [rows, length] by the names that a recipe has for them: `calib`, and every tenth of them as `heldout`.

    Rows that have names already keep them, and none of them are held out.

    length, samples   tokens in a row of text, and the most rows
    Raises Reject (bad-option, no-tokenizer, too-short).
    """
    if data is None:
        return {}
    if isinstance(data, Mapping):
        return {str(name): _token_rows(part, tokenizer, length, samples) for name, part in data.items()}
    rows = _token_rows(data, tokenizer, length, samples)
    is_held_out = torch.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
    return {"calib": rows[~is_held_out]} | ({"heldout": rows[is_held_out]} if is_held_out.any() else {})


def _token_rows(data: Rows, tokenizer: Any, length: int, samples: int) -> Tensor:
    if isinstance(data, Tensor):
        if data.dim() != 2 or data.dtype.is_floating_point or data.dtype.is_complex or len(data) < 1:
            raise invalid_option(f"`data` is {data.dtype} of shape {list(data.shape)}", help=FORMS).rejection()
        return data[:samples].to("cpu", torch.int64)
    if not isinstance(data, Iterable):
        raise invalid_option(f"`data` is {with_article(type(data).__name__)}", help=FORMS).rejection()
    if tokenizer is None:
        raise no_tokenizer(
            "`data` holds texts, and there is no tokenizer that makes tokens of them",
            help="pass `tokenizer=`, or a tensor of token ids [rows, length]",
        ).rejection()
    ids: list[int] = []
    for text in [data] if isinstance(data, str) else data:
        if not isinstance(text, str):
            raise invalid_option(f"`data` holds a {type(text).__name__} where a text is needed", help=FORMS).rejection()
        ids += encode(f"{text}\n\n", tokenizer)
        if len(ids) >= length * samples:
            break
    rows = list(token_windows(ids, length, start_token_id(tokenizer, "auto"), None, 0))
    return torch.stack(rows[:samples])
