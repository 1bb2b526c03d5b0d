"""Similarity of two encoders: hidden states of equal rows, those of the original stored on disk.

references/states/KEY.safetensors    tokens [n, t, d], pooled [n, d], in the model's own dtype
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...dsl.checker.values import DataRef
from ..models.rows.encoder_states import States, pooled_hidden_states, pooled_state_batches, resolve_pooling_name
from ..models.rows.forward import finite, in_eval_mode
from ..plugin.context import Context
from .reference import full, map_verified_file, other_vocabulary, reference_path


def write_states_once(ctx: Context, model: nn.Module, ref: DataRef, pooling_name: str = "auto") -> None:
    """Keep the hidden states that `model`, the original as loaded, has of a data set; nothing where they are kept."""
    path, rows = _reference_path(ctx, ref, pooling_name), ctx.rows(ref)
    if not path.is_file():
        write_hidden_states(
            ctx, model, rows, path, resolve_pooling_name(ctx.origin.folder, pooling_name), f"original on {ref.name}"
        )


def write_hidden_states(ctx: Context, model: nn.Module, rows: Tensor, path: Path, pooling: str, label: str) -> None:
    """Keep a model's states of rows in a file."""
    first = next(pooled_state_batches(model, rows[:1], pooling))
    dtype, pooled = first.tokens.dtype, []
    shapes = {name: (dtype, (len(rows), *x.shape[1:])) for name, x in (("t", first.tokens), ("v", first.pooled))}
    with full(path, shapes) as write:
        for states_new in ctx.each(pooled_state_batches(model, rows, pooling), label):
            write(states_new.tokens)
            pooled.append(states_new.pooled.to(dtype))
        write(torch.cat(pooled))
        ctx.origin.refuse_changed_files()


def load_or_make_states(ctx: Context, ref: DataRef, pooling_name: str = "auto") -> dict[str, Tensor]:
    """States written by `write_states_once`, mapped from disk: "t" [n, t, d], "v" [n, d]; one object for all calls."""
    name = f"states of {ref.name} by {pooling_name}"
    if name not in ctx._references:
        path = _reference_path(ctx, ref, pooling_name)
        if not path.is_file():
            write_states_once(ctx, ctx.origin.load(), ref, pooling_name)
        ctx._references[name] = map_verified_file(path)
    return ctx._references[name]


def _reference_path(ctx: Context, ref: DataRef, pooling_name: str) -> Path:
    return reference_path(ctx, ref, "states", resolve_pooling_name(ctx.origin.folder, pooling_name))


# -- how alike -----------------------------------------------------------------------------------------------


class Similarity(NamedTuple):
    rows: float
    tokens: float


def mean_cosine(model: nn.Module, rows: Tensor, original_states: dict[str, Tensor], pooling: str) -> Similarity:
    """Mean cosine between a model's states and those kept: of rows as a whole, and of their tokens."""
    rowwise, tokenwise, count, at = 0.0, 0.0, 0, 0
    for states_new in pooled_state_batches(model, rows, pooling):
        row_slice = slice(at, at + len(states_new.pooled))
        _refuse_other_token_shape(states_new.tokens, original_states["t"])
        rowwise += _cosines(states_new.pooled, original_states["v"][row_slice]).sum().item()
        tokenwise += (
            _cosines(states_new.tokens[states_new.mask], original_states["t"][row_slice][states_new.mask.cpu()])
            .sum()
            .item()
        )
        count, at = count + int(states_new.mask.sum()), row_slice.stop
    return Similarity(finite(rowwise / at, "similarity"), finite(tokenwise / count, "similarity"))


def _cosines(new: Tensor, reference: Tensor) -> Tensor:
    refuse_other_width(new, reference)
    return nn.functional.cosine_similarity(new.double(), reference.to(new.device).double(), dim=-1)


def _refuse_other_token_shape(new: Tensor, reference: Tensor, may_be_narrower: bool = False) -> None:
    """Raises Reject (other-vocabulary) for what is no state of the same tokens, as a result of a model with a head.

    new, reference  [b, t, width]; `may_be_narrower`: `new` may have fewer numbers a token
    """
    fits = new.shape[-1] <= reference.shape[-1] if may_be_narrower else new.shape[-1] == reference.shape[-1]
    if new.shape[1:-1] != reference.shape[1:-1] or not fits:
        actual, known = (" x ".join(map(str, x.shape[1:])) for x in (new, reference))
        raise other_vocabulary(
            f"similarity compares hidden states of {known} numbers a row, and {actual} are given",
            help="bound it of `hf`: an exported model with a head gives its result alone",
        ).rejection()


def refuse_other_width(new: Tensor, reference: Tensor) -> None:
    if new.shape != reference.shape:
        raise other_vocabulary(
            f"similarity compares states of {new.shape[-1]} numbers with the original's {reference.shape[-1]}",
            help="compare models whose hidden states are as wide as the original's",
        ).rejection()


def linear_cka(model: nn.Module, rows: Tensor, original_states: dict[str, Tensor], pooling: str) -> Similarity:
    """Linear CKA of the same: 1.0 also where states are turned or scaled alike; they may be narrower.

    Over tokens it takes sums of products of states alone, so that not all tokens' states are held.
    """
    rowwise, tokenwise, at = _Products(), _Products(), 0
    for states_new in pooled_state_batches(model, rows, pooling):
        row_slice = slice(at, at + len(states_new.pooled))
        _refuse_other_token_shape(states_new.tokens, original_states["t"], may_be_narrower=True)
        rowwise.add(states_new.pooled, original_states["v"][row_slice])
        tokenwise.add(states_new.tokens[states_new.mask], original_states["t"][row_slice][states_new.mask.cpu()])
        at = row_slice.stop
    return Similarity(finite(rowwise.cka(), "similarity"), finite(tokenwise.cka(), "similarity"))


class _Products:
    """Sums over samples of x, y and their products, float64: what linear CKA is made of.

    Source: Kornblith et al. 2019, "Similarity of neural network representations revisited" (arXiv 1905.00414), eq. 5.
    """

    def __init__(self) -> None:
        self.count = self.width = 0
        self.sums: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        both, self.width = torch.cat([x.detach().cpu(), y], -1).double(), x.shape[-1]  # [n, widths of x and y]
        total, products = self.sums or (0.0, 0.0)
        self.sums = total + both.sum(0), products + both.T @ both
        self.count += len(both)

    def cka(self) -> float:
        assert self.sums is not None, "there are no samples"
        total, products = self.sums
        centred = products - torch.outer(total, total) / self.count  # [d + d of y, d + d of y]
        d = self.width
        xx, yy, xy = centred[:d, :d], centred[d:, d:], centred[:d, d:]
        return float(xy.square().sum() / (xx.norm() * yy.norm()).clamp(min=1e-300))


def hidden_state_loss(states: States, original_tokens: Tensor, original_pooled: Tensor) -> Tensor:
    """Loss of states against the original's: tokens' squared error as a share of their size, and rows' 1 - cosine.

    Source: DistilBERT (Sanh et al. 2019, arXiv 1910.01108), section 3, and TinyBERT (Jiao et al. 2020, arXiv
    1909.10351), eq. 8, of the last layer; the share: own, so that the loss of all models is of one size.
    """
    reference = original_tokens.to(states.tokens.device)[states.mask].float()
    distance = (states.tokens[states.mask].float() - reference).square().sum() / reference.square().sum().clamp(
        min=1e-30
    )
    turned = 1 - nn.functional.cosine_similarity(
        states.pooled.float(), original_pooled.to(states.pooled.device).float(), dim=-1
    )
    return distance + turned.mean()


def mean_hidden_state_loss(model: nn.Module, rows: Tensor, original_states: dict[str, Tensor], pooling: str) -> float:
    """The mean of that loss over rows, without a gradient."""
    total, at = 0.0, 0
    for states_new in pooled_state_batches(model, rows, pooling):
        row_slice = slice(at, at + len(states_new.pooled))
        total += hidden_state_loss(
            states_new, original_states["t"][row_slice], original_states["v"][row_slice]
        ).item() * len(states_new.pooled)
        at = row_slice.stop
    return finite(total / at, "the distance of hidden states")


def accumulate_hidden_state_gradient(
    model: nn.Module, rows: Tensor, original_states: dict[str, Tensor], pooling: str, row_indices: Tensor, weight: float
) -> float:
    """The loss over the rows of these numbers; adds `weight` times its gradient to the parameters'.

    Without dropout: its noise in hidden states is many times what pruning left of an error there.
    """
    with in_eval_mode(model):
        states_new = pooled_hidden_states(model, rows[row_indices], pooling)
        loss = hidden_state_loss(states_new, original_states["t"][row_indices], original_states["v"][row_indices])
        (loss * weight).backward()
    return loss.item()
