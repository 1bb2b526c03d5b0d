"""Positions of prompts in the rows of a forward, for interventions on the residual stream.

The model's outermost forward knows token ids, padding and the cache, a layer knows none of them in the same way in
every architecture. So one object per model listens at that forward's door, and all interventions of the model ask it.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.pretrained import is_pretrained

_STATES = ("cache", "past_key_values", "past_key_value", "cache_params", "layer_past", "state")
_ROWS = ("input_ids", "inputs_embeds")


@dataclass(frozen=True)
class Cells:
    """Some places of a batch: cell i is row `rows[i]`, position `columns[i]`; both [n] int64."""

    rows: Tensor
    columns: Tensor


class Prompts:
    """Prompts of the current forward: at `start` .. `stop` of its rows, or the continuation of earlier ones.

    A forward that begins without a cached token reads prompts: whole rows but for padding on either side, or as
    many tokens as `mask` says. One that goes on after cached tokens reads no prompt. What is kept of a forward
    stays until the next one, as layers run again in a backward pass where activations are recomputed.
    """

    def __init__(self) -> None:
        self.on = True
        self.mask: Tensor | None = None  # [b] tokens of each prompt
        self.subspace: Tensor | None = None  # [r] or [b, r] bool: which coordinates are active; None: all
        self.shape: tuple[int, int] | None = None
        self.extent: tuple[Tensor, Tensor] | None = None
        self._cache: dict[tuple[int, int], tuple[Cells, Cells]] = {}

    def locate_prompts_before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Locate the prompts of a batch before the forward that is given token ids (a pre-hook)."""
        inputs = dict(zip(_forward_parameter_names(type(model)), args, strict=False)) | kwargs
        rows = next((inputs[name] for name in _ROWS if inputs.get(name) is not None), None)
        if rows is not None and not isinstance(rows, Tensor):
            return  # a trace, whose leaves run on the values of an earlier forward
        self._cache.clear()
        self.shape = None if rows is None else (rows.shape[0], rows.shape[1])
        self.extent = (
            None
            if rows is None or _continues_from_cache(inputs)
            else self._prompt_start_and_stop(rows, inputs.get("attention_mask"))
        )

    def _prompt_start_and_stop(self, rows: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        b, t = rows.shape[:2]
        start = torch.zeros(b, dtype=torch.int64, device=rows.device)
        stop = torch.full_like(start, t)
        real = None if rows.is_meta else _non_padding_of_mask(mask, b, t)  # [b, t]
        if real is not None:
            positions = torch.arange(t, device=real.device)
            start = torch.where(real, positions, t).amin(1).to(rows.device)
            stop = torch.where(real, positions + 1, 0).amax(1).to(rows.device)
        if self.mask is not None:
            if len(self.mask) != b:
                raise ValueError(f"{len(self.mask)} prompts were told of, and a forward reads {b} rows")
            stop = torch.minimum(start + self.mask.to(rows.device), stop)
        return start, torch.maximum(start, stop)

    def first_and_last_prompt_cells(self, hidden: Tensor, n_first: int, n_last: int) -> tuple[Cells, Cells] | None:
        """The `n_first` first and `n_last` last positions of the prompts of [b, t, d]; None where none is being read.

        Layers that run without their model, as a search does it, are given whole rows.
        """
        b, t = hidden.shape[:2]
        if self.shape != (b, t):
            return _cells_at_both_ends(
                torch.zeros(b, dtype=torch.int64), torch.full((b,), t), n_first, n_last, t, hidden.device
            )
        if self.extent is None:
            return None
        if (n_first, n_last) not in self._cache:
            self._cache[n_first, n_last] = _cells_at_both_ends(*self.extent, n_first, n_last, t, hidden.device)
        return self._cache[n_first, n_last]


def edited_counts_at_both_ends(prompt_lengths: Tensor, n_first: int, n_last: int) -> tuple[Tensor, Tensor]:
    """Number of edited positions at the start and at the end of prompts of these lengths [b], without overlap.

    A prompt shorter than both together is halved, the middle one of an odd number behind. Source: LoReFT (Wu et al.
    2024, arXiv 2404.03592), appendix C; where only one side is asked for, it gets all there is: own.
    """
    if not n_first or not n_last:
        return prompt_lengths.clamp(max=n_first), prompt_lengths.clamp(max=n_last)
    short, half = prompt_lengths < n_first + n_last, prompt_lengths // 2
    return (
        torch.where(short, half.clamp(max=n_first), n_first),
        torch.where(short, (prompt_lengths - half).clamp(max=n_last), n_last),
    )


def _cells_at_both_ends(
    start: Tensor, stop: Tensor, n_first: int, n_last: int, row_length: int, device: torch.device
) -> tuple[Cells, Cells]:
    front, behind = edited_counts_at_both_ends(stop - start, n_first, n_last)
    positions = torch.arange(row_length, device=start.device)  # [t]
    start, stop = start[:, None], stop[:, None]
    prefix = (positions >= start) & (positions < start + front[:, None])  # [b, t]
    suffix = (positions < stop) & (positions >= stop - behind[:, None])
    first_of, last_of = (Cells(*(x.to(device) for x in mask.nonzero(as_tuple=True))) for mask in (prefix, suffix))
    return first_of, last_of


def _continues_from_cache(inputs: Mapping[str, Any]) -> bool:
    """Whether a forward comes after tokens that a cache or a state already holds."""
    return any(_cache_has_entries(inputs[name]) for name in _STATES if inputs.get(name) is not None)


def _cache_has_entries(state: Any) -> bool:
    from transformers.cache_utils import Cache

    if not isinstance(state, Cache):
        return True  # RWKV hands its state on, and begins without one
    for query in (state.get_seq_length, state.has_previous_state):
        try:
            if query():
                return True
        except ValueError:  # a cache of only one kind of layers can't say it of the other
            continue
    return False


def _non_padding_of_mask(mask: Any, b: int, t: int) -> Tensor | None:
    """Mask of tokens that are no padding, [b, t]; None where it is unknown.

    mask   [b, t] as tokenizers give it, or what generation with a fixed cache makes of it: [b, 1, t, s], True or
           0.0 where a token may look, or a dict of such
    """
    if isinstance(mask, Mapping):
        mask = next((m for m in mask.values() if m is not None), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 4:
        newest = mask[:, 0, -1, :t].expand(b, -1)
        return newest if newest.dtype == torch.bool else newest >= 0
    assert mask.dim() == 2 and mask.shape[1] >= t, f"an attention mask {tuple(mask.shape)} for {b} rows of {t}"
    return mask[:, :t] > 0


# -- at a model ----------------------------------------------------------------------------------------------


def listener(model: nn.Module) -> Prompts | None:
    """The object that listens at a model's door, if one does."""
    owners = (getattr(hook, "__self__", None) for hook in _body_called_with_ids(model)._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Prompts)), None)


def get_or_attach_prompts(model: nn.Module) -> Prompts:
    """The model's prompt hook, registered where there is none."""
    hook = listener(model)
    if hook is None:
        hook = Prompts()
        _body_called_with_ids(model).register_forward_pre_hook(hook.locate_prompts_before_forward, with_kwargs=True)
    return hook


def _body_called_with_ids(model: nn.Module) -> nn.Module:
    """The outermost module that is always called with token ids: of transformers' models, the one below a head."""
    return model.base_model if is_pretrained(model) else model


def _forward_parameter_names(module_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of what a forward takes, without `self`."""
    return tuple(inspect.signature(inspect.unwrap(module_class.forward)).parameters)[1:]


@contextmanager
def prompts(model: nn.Module, prompt_lengths: Tensor | None = None, subspace: Tensor | None = None) -> Iterator[None]:
    """Inside, the prompt of row i is its first `prompt_lengths[i]` tokens after padding, in forwards without a cache.

    prompt_lengths  [b] int64; without it, rows are prompts as a whole
    subspace   [r] or [b, r] bool: which coordinates of an edit are active; all where it is None
    Nothing happens where the model has no interventions.
    """
    hook = listener(model)
    if hook is None:
        yield
        return
    before = hook.mask, hook.subspace
    hook.mask, hook.subspace = prompt_lengths, subspace
    try:
        yield
    finally:
        hook.mask, hook.subspace = before


@contextmanager
def without_interventions(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it would without its interventions, bit for bit."""
    hook = listener(model)
    before = hook.on if hook else True
    if hook:
        hook.on = False
    try:
        yield
    finally:
        if hook:
            hook.on = before


def parameters_above_body(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that lie above the module that is given token ids, by name."""
    body = {id(p) for p in _body_called_with_ids(model).parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in body}
