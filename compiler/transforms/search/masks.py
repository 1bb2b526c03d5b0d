"""Masks from scores: the smallest scores go first, of equal ones the first.

Thresholds are found by selection, in linear time; only neighbours in small groups are sorted. On a CPU numpy compares,
counts and multiplies two to five times as fast as torch does with one thread.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ....dsl.checker.inputs import PATTERNS

OUTPUTS, INPUTS = 16, 2  # of a block: one vector of the kernel `block_sparse_linear`

LEAST = 0.01  # share of a matrix that is zero on purpose
LONG, SAMPLE = 1 << 20, 1 << 16  # numbers of a row whose threshold is looked for near a sample's, and of the sample


def is_sparse(weight: Tensor) -> bool:
    """Whether at least 1% of a matrix, and not all, is exactly zero: fewer come about by chance, and a matrix that is
    all zero waits to be trained."""
    zeros = weight.numel() - int(weight.count_nonzero())
    return LEAST * weight.numel() <= zeros < weight.numel()


def keep_mask(scores: Tensor, sparsity: float, pattern: str, scope: Literal["row", "module"]) -> Tensor:
    """True where a weight stays; of equal scores the first ones go.

    scores   [out, in]   not negative, float32 or float64; but of "blocks" int16 as well
    sparsity    of the weights that go, rounded down to whole weights or blocks; the groups' own for "2:4" and "4:8"
    pattern  "any"; "2:4" or "4:8": so many of every so many neighbours along the inputs; or "blocks" of 16
             outputs by 2 inputs, which go and stay whole
    scope     what loses that share: a "row" of the weight (of blocks: 16 rows), or the whole "module"
    Asserts that groups divide the inputs: `sparsity.refuse_unsupported_pattern` refuses other modules.
    """
    if pattern == "blocks":
        block_mask = keep_mask(_mean_squares_of_blocks(scores), sparsity, "any", scope)
        expanded = block_mask.repeat_interleave(OUTPUTS, 0).repeat_interleave(INPUTS, 1)
        return expanded[: scores.shape[0], : scores.shape[1]]
    if pattern in PATTERNS:
        zeros, of = PATTERNS[pattern]
        assert scores.shape[1] % of == 0, f"{scores.shape[1]} inputs in groups of {of}"
        return group_keep_mask(scores, zeros, of)
    flat = scores if scope == "row" else scores.reshape(1, -1)
    return largest_of_rows_mask(flat, flat.shape[1] - int(sparsity * flat.shape[1])).view(scores.shape)


def group_keep_mask(scores: Tensor, n_zeros: int, group_size: int) -> Tensor:
    """True but for the `n_zeros` least of every `group_size` neighbours along the inputs, [out, in] bool."""
    least = scores.reshape(-1, group_size).argsort(dim=1, stable=True)[:, :n_zeros]  # [out * in / of, gone]
    keep = torch.ones(least.shape[0], group_size, dtype=torch.bool, device=scores.device).scatter_(1, least, False)
    return keep.view(scores.shape)


def largest_of_rows_mask(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest of every row, [n, m] bool; of equal ones the last stay."""
    n_removed = scores.shape[1] - count
    if not n_removed or not count:
        return torch.full_like(scores, bool(count), dtype=torch.bool)
    least = kth_smallest_of_rows(scores, n_removed)
    keep = _at_least(scores, least)
    extra = _counts(keep) - count  # of those at the threshold the first go, [n]
    for row in extra.nonzero()[:, 0].tolist():
        ties = _ties(scores[row], least[row])[: int(extra[row])]
        keep[row, ties] = False
    return keep


def _counts(keep: Tensor) -> Tensor:
    """Number of remaining entries of every row, [n]; numpy counts ten times as fast as torch."""
    if keep.device.type != "cpu":
        return torch.count_nonzero(keep, 1)
    return torch.from_numpy(np.count_nonzero(keep.numpy(), axis=1))


def _at_least(score: Tensor, threshold: Tensor) -> Tensor:
    if score.device.type != "cpu":
        return score >= threshold
    return torch.from_numpy(score.numpy() >= threshold.numpy())


def _ties(row: Tensor, threshold: Tensor) -> Tensor:
    """Places of a row where it is `threshold` [1]."""
    if row.device.type != "cpu":
        return (row == threshold).nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(row.numpy() == threshold.numpy()))


def magnitude_sort_keys(weight: Tensor) -> Tensor:
    """Sort keys of magnitudes, cheaper to compare: of 16-bit floats their bits without the
    sign, int16; of others the magnitudes."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return magnitude(weight)
    bits = weight.view(torch.int16)
    return bits & 0x7FFF if bits.device.type != "cpu" else torch.from_numpy(bits.numpy() & np.int16(0x7FFF))


def magnitude(weight: Tensor) -> Tensor:
    """Of every number, float32 at least, in a tensor of its own."""
    return weight.abs() if weight.dtype in (torch.float32, torch.float64) else weight.float().abs_()


def masked_copy(weight: Tensor, keep_mask: Tensor) -> Tensor:
    """The weight with zeros where it does not stay: its bits times one or nothing, ten times as fast as a choice."""
    kind = _BITS.get(weight.dtype)
    if kind is None:
        return torch.where(keep_mask, weight, 0.0)
    bits = weight.view(kind)
    if bits.device.type != "cpu":
        return (bits * keep_mask).view(weight.dtype)
    return torch.from_numpy(bits.numpy() * keep_mask.numpy().view(np.int8)).view(weight.dtype)


_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def kth_smallest_of_rows(scores: Tensor, rank_from_1: int) -> Tensor:
    """The `rank_from_1`-th smallest of every row, counted from 1: [n, 1]."""
    if scores.device.type != "cpu":
        return scores.kthvalue(rank_from_1, dim=1, keepdim=True).values
    rows = scores.numpy()
    if rows.shape[1] >= LONG:
        return torch.from_numpy(np.stack([_kth_smallest_of_long_row(row, rank_from_1) for row in rows])[:, None])
    partitioned = np.partition(rows, rank_from_1 - 1, axis=1)[
        :, rank_from_1 - 1 : rank_from_1
    ]  # three times as fast as kthvalue
    return torch.from_numpy(partitioned.copy())


def _kth_smallest_of_long_row(row: np.ndarray, rank_from_1: int) -> np.generic:
    """The `rank_from_1`-th smallest of a long row. A sample tells about where it is, so that three in a hundred numbers
    are left to partition; where it misleads, all are."""
    sample = np.sort(row[:: len(row) // SAMPLE])
    at, slack = rank_from_1 * len(sample) // len(row), 4 * math.isqrt(len(sample))
    low, high = sample[max(0, at - slack)], sample[min(len(sample) - 1, at + slack)]
    in_range = row >= low
    rank = rank_from_1 - len(row) + int(np.count_nonzero(in_range))
    in_range &= row <= high
    some = row[in_range]
    if not 1 <= rank <= len(some):
        some, rank = row, rank_from_1
    return np.partition(some, rank - 1)[rank - 1]


def _mean_squares_of_blocks(scores: Tensor) -> Tensor:
    """Mean square of every block, so that a narrow one at the edge is not less for being narrow."""
    n, k = scores.shape
    pad = (0, -k % INPUTS, 0, -n % OUTPUTS)
    total = nn.functional.pad(scores.double().square(), pad)
    count = nn.functional.pad(torch.ones_like(scores, dtype=torch.float64), pad)
    blocks = (-1, OUTPUTS, total.shape[1] // INPUTS, INPUTS)
    return total.reshape(blocks).sum((1, 3)) / count.reshape(blocks).sum((1, 3))
