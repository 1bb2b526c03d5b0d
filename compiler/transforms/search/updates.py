"""Zeros and codes in a weight whose other weights move to make up for them, from what the module is given.

All work on a matrix W [out, in] and the sums H = sum of x x^T [in, in] over the inputs x, and keep the outputs
W x as they are: least squares, layer by layer, without training.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ....dsl.checker.inputs import PATTERNS
from ....kernels.grid import Grid, concatenate_scales
from .descent import coordinate_descent
from .masks import group_keep_mask, keep_mask, largest_of_rows_mask
from .reconstruct import damped_cholesky_factor

BLOCK = 128  # columns that are settled together before those behind them follow
DAMPING = 0.01  # of the mean diagonal of H

SettleColumn = Callable[[int, Tensor], Tensor]  # column number, its weights [out] -> what they become


def upper_factor_of_inverse(gram: Tensor, damping_share: float) -> Tensor:
    """Upper R with R^T R = (H + damping_share * mean diagonal)^-1, [in, in] float32, solved in float64.

    Inputs that are always zero get 1 on the diagonal first: their weights are worth nothing and ask for nothing.
    """
    alive = alive_inputs(gram)
    flipped = gram.flip(0, 1)
    flipped.diagonal().copy_(torch.where(alive, gram.diagonal(), 1.0).flip(0))
    lower = damped_cholesky_factor(flipped, range(len(gram)), damping_share)
    eye = torch.eye(len(gram), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()


def alive_inputs(gram: Tensor) -> Tensor:
    """[in] bool: which inputs are ever anything but zero."""
    return gram.diagonal() > 0


@torch.no_grad()
def solve_sparsegpt(
    weight: Tensor, input_gram: Tensor, sparsity: float, pattern: str, damping_share: float = DAMPING
) -> Tensor:
    """W with zeros by SparseGPT, [out, in] float32.

    Columns are settled from the first to the last; what a zero takes from the outputs, the weights behind it give
    back. Of each block of 128 columns those weights go that the outputs miss least, w^2 / R_jj^2, over all rows
    together; with "2:4" and "4:8", of each group when its turn comes.

    sparsity   of every block's weights, rounded down. The published code zeroes one more: all up to the threshold
    Source: Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1; block, damping and dead columns as in its
    code.
    """
    work = weight.float() * alive_inputs(input_gram)
    upper = upper_factor_of_inverse(input_gram, damping_share)
    keep = torch.ones_like(work, dtype=torch.bool)
    group = PATTERNS[pattern][1] if pattern in PATTERNS else 0

    def choose(start: int, columns: Tensor) -> None:
        stop = start + columns.shape[1]
        score = columns.square() / upper.diagonal()[start:stop].square()
        keep[:, start:stop] = keep_mask(score, sparsity, pattern, "module")

    def rounded(column: int, w: Tensor) -> Tensor:
        return torch.where(keep[:, column], w, 0.0)

    return settle_columns_inplace(work, upper, rounded, choose, group or BLOCK)


@torch.no_grad()
def settle_columns_inplace(
    weight: Tensor,
    inverse_factor: Tensor,
    settle_column: SettleColumn,
    on_block: Callable[[int, Tensor], None] | None = None,
    block_columns: int = BLOCK,
) -> Tensor:
    """Columns become what `settle_column` says, one after another; those behind give back what that costs.

    weight          [out, in] float32; overwritten with the result
    inverse_factor  the factor of the inverse, `upper_factor_of_inverse`
    on_block        is shown the columns start .. start + block_columns, as they are then, before they are settled
    block_columns   divides 128
    Source: the blocked loop of GPTQ (Frantar et al. 2022, arXiv 2210.17323), section 3.3.
    """
    for start in range(0, weight.shape[1], BLOCK):
        stop = min(start + BLOCK, weight.shape[1])
        block, inner = weight[:, start:stop].T.contiguous(), inverse_factor[start:stop, start:stop]  # [block, out]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            if on_block is not None and i % block_columns == 0:
                on_block(start + i, block[i : i + block_columns].T)
            new = settle_column(start + i, block[i])
            errors[i] = (block[i] - new) / inner[i, i]
            block[i] = new
            if i + 1 < stop - start:
                block[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
        weight[:, start:stop] = block.T
        weight[:, stop:].addmm_(errors.T, inverse_factor[start:stop, stop:], alpha=-1)
    return weight


@torch.no_grad()
def solve_gptq(
    weight: Tensor,
    input_gram: Tensor,
    grid: Grid,
    column_order_kind: Literal["activation", "given"],
    keep_mask: Tensor | None,
    damping_share: float = DAMPING,
    sweep_count: int = 0,
) -> Tensor:
    """W on a grid by GPTQ, [out, in] float32: what a column loses by rounding, those behind it give back.

    column_order_kind  "activation": columns with large inputs first, on scales that were fitted to W before; or
                       "given": as they lie, each group's scales fitted when its turn comes
    keep_mask          [out, in] bool: where it is False the result is 0, and what that costs is given back, too
    sweep_count        how often scales and codes are looked at again after that, `descent`
    Source: Frantar et al. 2022 (arXiv 2210.17323), section 3.3; activation order with static groups as in its code.
    """
    target = weight.float() * alive_inputs(input_gram)
    order_index = (
        input_gram.diagonal().argsort(descending=True, stable=True)
        if column_order_kind == "activation"
        else torch.arange(len(input_gram))
    )
    width, squares = grid.width(len(input_gram)), input_gram.diagonal()
    late = column_order_kind == "given" and BLOCK % width == 0
    fitted = [] if late else [grid.fit_scales(target, squares)]
    column_order = order_index.tolist()

    def fit(start: int, columns: Tensor) -> None:
        fitted.append(grid.fit_scales(columns, squares[start : start + columns.shape[1]]))

    def rounded(column: int, w: Tensor) -> Tensor:
        new = fitted[-1].round_column(w, 0 if late else column_order[column] // width)
        return new if keep_mask is None else torch.where(keep_mask[:, column_order[column]], new, 0.0)

    upper = upper_factor_of_inverse(input_gram[order_index][:, order_index], damping_share)
    done = settle_columns_inplace(
        target[:, order_index], upper, rounded, fit if late else None, width if late else BLOCK
    )
    done = torch.empty_like(done).index_copy_(1, order_index, done)
    if not sweep_count:
        return done
    damped = input_gram.clone()
    damped.diagonal().add_(damping_share * input_gram.diagonal().mean())
    return coordinate_descent(target, damped, concatenate_scales(fitted), done, keep_mask, sweep_count)[0]


ADMM_STEPS, ADMM_GROWTH = 24, 16  # rounds, and those of them over which zeros become as many as asked


@torch.no_grad()
def solve_admm(
    weight: Tensor, input_gram: Tensor, sparsity: float, pattern: str, damping_share: float = DAMPING
) -> Tensor:
    """W with zeros by alternating directions, [out, in] float32: all weights move, not only those behind a zero.

    Inputs are scaled to norm 1, so that a weight's size says what it is worth. Two copies of the weight are pulled
    together: one that gives the outputs, one with zeros, which grow in number over the first rounds. Every output
    loses the same share, rounded down.

    Source: Boza 2024, "Fast and Effective Weight Update for Pruned Large Language Models" (arXiv 2401.02938),
    algorithms 1 and 2.
    """
    alive = alive_inputs(input_gram)
    norms = torch.where(alive, input_gram.diagonal(), 1.0).sqrt()  # [in]
    scaled = input_gram / norms / norms[:, None]
    scaled.diagonal().copy_(torch.where(alive, scaled.diagonal(), 1.0))
    scaled.diagonal().mul_(1 + damping_share)
    first = weight.float() * alive * norms
    target = first @ scaled  # W H [out, in]
    shifted = scaled.clone()
    shifted.diagonal().add_(1.0)  # rho = 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted.double())).float()
    current, dual, zeroed = first, torch.zeros_like(first), first
    for step in range(ADMM_STEPS):
        if step <= ADMM_GROWTH:
            keep = _keep_mask_at_progress((current + dual).abs(), sparsity, pattern, min(1.0, (step + 1) / ADMM_GROWTH))
        zeroed = (current + dual) * keep
        dual = dual + current - zeroed
        current = (target + zeroed - dual) @ inverse
    return torch.where(keep, (current + dual) / norms, 0.0)


def _keep_mask_at_progress(importance: Tensor, sparsity: float, pattern: str, progress: float) -> Tensor:
    """The mask on the way there: a cubic rise, as of gradual pruning (Zhu and Gupta 2017, arXiv 1710.01878)."""
    if pattern in PATTERNS:
        zeros, of = PATTERNS[pattern]
        return group_keep_mask(importance, max(1, round(zeros * (1 - (1 - progress) ** 3))), of)
    zeros = (
        int(sparsity * importance.shape[1] * (1 - (1 - progress) ** 3))
        if progress < 1
        else int(sparsity * importance.shape[1])
    )
    return largest_of_rows_mask(importance, importance.shape[1] - zeros)
