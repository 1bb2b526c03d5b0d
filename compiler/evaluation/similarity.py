"""How alike two encoders are: their hidden states of the same rows, those of the original kept on disk.

references/states/KEY.safetensors    tokens [n, t, d], pooled [n, d], in the model's own dtype
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ...dsl.checker.values import DataRef
from ...dsl.syntax.diagnostics import Reject
from ..models.rows.encoder_states import States, every_state, pooling_of, states
from ..models.rows.forward import finite, without_dropout
from ..plugin.context import Context
from .reference import mapped, other_vocabulary, place_of, whole


def prepare(ctx: Context, model: nn.Module, ref: DataRef, asked: str = "auto") -> None:
    """Keep the hidden states that `model`, the original as loaded, has of a data set; nothing where they are kept."""
    place, rows = _place(ctx, ref, asked), ctx.rows(ref)
    if not place.is_file():
        keep(ctx, model, rows, place, pooling_of(ctx.origin.folder, asked), f"original on {ref.name}")


def keep(ctx: Context, model: nn.Module, rows: Tensor, place: Path, pooling: str, label: str) -> None:
    """Keep a model's states of rows in a file."""
    first = next(every_state(model, rows[:1], pooling))
    dtype, pooled = first.tokens.dtype, []
    shapes = {name: (dtype, (len(rows), *x.shape[1:])) for name, x in (("t", first.tokens), ("v", first.pooled))}
    with whole(place, shapes) as write:
        for made in ctx.each(every_state(model, rows, pooling), label):
            write(made.tokens)
            pooled.append(made.pooled.to(dtype))
        write(torch.cat(pooled))
        ctx.origin.refuse_change()


def load(ctx: Context, ref: DataRef, asked: str = "auto") -> dict[str, Tensor]:
    """What `prepare` kept, mapped from disk: "t" [n, t, d] and "v" [n, d]; the same object every time."""
    name = f"states of {ref.name} by {asked}"
    if name not in ctx._references:
        place = _place(ctx, ref, asked)
        if not place.is_file():
            prepare(ctx, ctx.origin.load(), ref, asked)
        ctx._references[name] = mapped(place)
    return ctx._references[name]


def _place(ctx: Context, ref: DataRef, asked: str) -> Path:
    return place_of(ctx, ref, "states", pooling_of(ctx.origin.folder, asked))


# -- how alike -----------------------------------------------------------------------------------------------


def cosine(model: nn.Module, rows: Tensor, kept: dict[str, Tensor], pooling: str) -> tuple[float, float]:
    """Mean cosine between a model's states and those kept: of rows as a whole, and of their tokens."""
    rowwise, tokenwise, count, at = 0.0, 0.0, 0, 0
    for made in every_state(model, rows, pooling):
        theirs = slice(at, at + len(made.pooled))
        _check_tokens(made.tokens, kept["t"])
        rowwise += _cosines(made.pooled, kept["v"][theirs]).sum().item()
        tokenwise += _cosines(made.tokens[made.counted], kept["t"][theirs][made.counted.cpu()]).sum().item()
        count, at = count + int(made.counted.sum()), theirs.stop
    return finite(rowwise / at, "similarity"), finite(tokenwise / count, "similarity")


def _cosines(ours: Tensor, theirs: Tensor) -> Tensor:
    check_width(ours, theirs)
    return nn.functional.cosine_similarity(ours.double(), theirs.to(ours.device).double(), dim=-1)


def _check_tokens(ours: Tensor, theirs: Tensor) -> None:
    """Raises Reject (other-vocabulary) for what is no state of the same tokens, as a result of a model with a head."""
    if ours.shape[1:] != theirs.shape[1:]:
        found, known = (" x ".join(map(str, x.shape[1:])) for x in (ours, theirs))
        raise Reject(
            other_vocabulary(
                f"similarity compares hidden states of {known} numbers a row, and {found} are given",
                help="bound it of `hf`: an exported model with a head gives its result alone",
            )
        )


def check_width(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise Reject(
            other_vocabulary(
                f"similarity compares states of {ours.shape[-1]} numbers with the original's {theirs.shape[-1]}",
                help="compare models whose hidden states are as wide as the original's",
            )
        )


def linear_cka(model: nn.Module, rows: Tensor, kept: dict[str, Tensor], pooling: str) -> tuple[float, float]:
    """Linear CKA of the same: 1.0 also where states are turned or scaled alike.

    Over tokens it takes sums of products of states alone, so that not all tokens' states are held.
    """
    rowwise, tokenwise, at = _Products(), _Products(), 0
    for made in every_state(model, rows, pooling):
        theirs = slice(at, at + len(made.pooled))
        _check_tokens(made.tokens, kept["t"])
        rowwise.add(made.pooled, kept["v"][theirs])
        tokenwise.add(made.tokens[made.counted], kept["t"][theirs][made.counted.cpu()])
        at = theirs.stop
    return finite(rowwise.cka(), "similarity"), finite(tokenwise.cka(), "similarity")


class _Products:
    """Sums over samples of x, y and their products, float64: what linear CKA is made of.

    Source: Kornblith et al. 2019, "Similarity of neural network representations revisited" (arXiv 1905.00414), eq. 5.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        check_width(x, y)
        both = torch.cat([x.detach().cpu(), y], -1).double()  # [n, 2d]
        total, products = self.sums or (0.0, 0.0)
        self.sums = total + both.sum(0), products + both.T @ both
        self.count += len(both)

    def cka(self) -> float:
        assert self.sums is not None, "there are no samples"
        total, products = self.sums
        centred = products - torch.outer(total, total) / self.count  # [2d, 2d]
        d = len(total) // 2
        xx, yy, xy = centred[:d, :d], centred[d:, d:], centred[:d, d:]
        return float(xy.square().sum() / (xx.norm() * yy.norm()).clamp(min=1e-300))


def feature_loss(made: States, tokens: Tensor, pooled: Tensor) -> Tensor:
    """How far states are from the original's: tokens' squared error as a share of their size, and rows' 1 - cosine.

    Source: DistilBERT (Sanh et al. 2019, arXiv 1910.01108), section 3, and TinyBERT (Jiao et al. 2020, arXiv
    1909.10351), eq. 8, of the last layer; the share: own, so that the loss of all models is of one size.
    """
    theirs = tokens.to(made.tokens.device)[made.counted].float()
    apart = (made.tokens[made.counted].float() - theirs).square().sum() / theirs.square().sum().clamp(min=1e-30)
    turned = 1 - nn.functional.cosine_similarity(made.pooled.float(), pooled.to(made.pooled.device).float(), dim=-1)
    return apart + turned.mean()


def feature_distance(model: nn.Module, rows: Tensor, kept: dict[str, Tensor], pooling: str) -> float:
    """The mean of that loss over rows, without a gradient."""
    total, at = 0.0, 0
    for made in every_state(model, rows, pooling):
        theirs = slice(at, at + len(made.pooled))
        total += feature_loss(made, kept["t"][theirs], kept["v"][theirs]).item() * len(made.pooled)
        at = theirs.stop
    return finite(total / at, "the distance of hidden states")


def learn(
    model: nn.Module, rows: Tensor, kept: dict[str, Tensor], pooling: str, chosen: Tensor, weight: float
) -> float:
    """The loss over the rows of these numbers; adds `weight` times its gradient to the parameters'.

    Without dropout: its noise in hidden states is many times what pruning left of an error there.
    """
    with without_dropout(model):
        made = states(model, rows[chosen], pooling)
        loss = feature_loss(made, kept["t"][chosen], kept["v"][chosen])
        (loss * weight).backward()
    return loss.item()
