"""What rows are to a model: which of its arguments they become, where texts end, and what is to be predicted.

A row of a model that reads one sequence is that sequence. A row of an encoder with a decoder is both: its first half
what the encoder is given, its second half what the decoder says.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Reject
from ..checkpoints.config_classes import model_class
from ..checkpoints.pretrained import is_pretrained, pretrained
from .packed_inputs import SAMPLES, hears, other_parts, parts, tokens_of, unpacked


def arguments(model: nn.Module, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with rows [b, t], on its device, without a cache."""
    rows, more = rows.to(device_of(model)), without_cache(model)
    if parts(model):
        return (), _several(model, rows) | more
    if rows.is_floating_point():
        return (rows.to(dtype_of(model)),), more
    if not hasattr(model, "can_generate"):
        return (rows,), more
    if (main := getattr(model, "main_input_name", "")) in SAMPLES:
        raise Reject(
            other_parts(
                f"{type(model).__name__} takes `{main}`, and its rows are token ids", help="give it rows of `tensors`"
            )
        )
    if has_two_sides(model):
        source, target = sides(rows)
        given = {"decoder_input_ids": begun(model, target), **more}
        return (source,), {**_mask(source, padding(model)), **given}
    return (rows,), (more if pretrained(model).can_generate() else {**_mask(rows, padding(model)), **more})


def _several(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """What rows that hold several inputs are to a model."""
    found, tokens = unpacked(model, rows)
    if not tokens_of(model):
        return found
    if hears(model):
        return found | {"decoder_input_ids": begun(model, tokens)}
    return found | {"input_ids": tokens, **_mask(tokens, padding(model))}


def device_of(model: nn.Module) -> torch.device:
    """Where the first of its tensors is; asked for every forward, so the others are not gathered."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Of what a model computes with: images that it is given are to be so, too; not all of them see to it."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def without_cache(model: nn.Module) -> dict[str, Any]:
    """`use_cache=False` for models that know it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def has_two_sides(model: nn.Module) -> bool:
    """Whether a model is an encoder with a decoder, which take a sequence each; one that effc's engine runs, too."""
    known = is_pretrained(model) or hasattr(model, "facts")
    return known and "decoder_input_ids" in _names(type(model).forward)


def is_two_sided(config: Mapping[str, Any]) -> bool:
    """The same of a model that is not made yet, by its config as plain JSON."""
    kind = model_class(str(config.get("model_type")), config.get("architectures"))
    return kind is not None and "decoder_input_ids" in _names(kind.forward)


@cache
def _names(forward: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(inspect.unwrap(forward)).parameters)


def sides(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Source and target of rows [b, t]: [b, t // 2] each; the last of an odd number is left out."""
    half = rows.shape[1] // 2
    return rows[:, :half], rows[:, half : 2 * half]


def begun(model: nn.Module, target: Tensor) -> Tensor:
    """What a decoder is given that is to say a target: its own first token, and all but the last of the target's."""
    return torch.cat([torch.full_like(target[:, :1], first_said(model)), target[:, :-1]], dim=1)


def first_said(model: nn.Module) -> int:
    """The token that a target begins with."""
    own = pretrained(model)
    first = own.config.get_text_config(decoder=True)
    return next(
        (
            token
            for config in (getattr(own, "generation_config", None), own.config, first)  # none without a head
            for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
            if isinstance(token := getattr(config, name, None), int)
        ),
        0,
    )


def words(model: nn.Module, *, said: bool = False) -> int | None:
    """How many tokens a model reads, or says, where its config tells: a translator may have a vocabulary for each."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    said = said and has_two_sides(model)
    text = config.get_text_config(**({"decoder": True} if said else {}))
    own = getattr(text, "decoder_vocab_size" if said else "src_vocab_size", None)
    return own or getattr(text, "vocab_size", None)


def padding(model: nn.Module) -> int | None:
    """The token that fills rows up, where the config says."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    token = getattr(text, "pad_token_id", None)
    return token if isinstance(token, int) else None


def written(rows: Tensor, fill: int | None) -> Tensor:
    """Which tokens of rows [b, t] are none of the filling behind them; one that is filling alone keeps its first."""
    if fill is None or rows.is_floating_point():
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    behind = (rows != fill).flip(1).long().cumsum(1).flip(1) > 0  # [b, t] a token that is none follows, or is here
    behind[:, 0] = True
    return behind


def _mask(rows: Tensor, fill: int | None) -> dict[str, Tensor]:
    """A mask where rows are filled up; whole rows go without one."""
    seen = written(rows, fill)
    return {} if bool(seen.all()) else {"attention_mask": seen.long()}


def predictions(model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a model's logits are to predict of rows, [b, p], and which of it counts, [b, p]: None for all."""
    if not has_two_sides(model):
        return rows[:, 1:], None
    target = unpacked(model, rows)[1] if hears(model) else sides(rows)[1]
    return target, written(target, padding(model))
