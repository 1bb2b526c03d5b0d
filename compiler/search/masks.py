"""Which numbers of a score stay: as many go as asked, the least first, of equal ones the first.

Thresholds are found by selection, in linear time; only neighbours in small groups are sorted.
"""

import numpy as np
import torch
from torch import Tensor, nn

from ...dsl.inputs import PATTERNS

OUTPUTS, INPUTS = 16, 2  # of a block: one vector of the kernel `block_sparse_linear`

LEAST = 0.01  # share of a matrix that is zero on purpose


def is_sparse(weight: Tensor) -> bool:
    """Whether at least 1% of a matrix, and not all, is exactly zero: fewer come about by chance, and a matrix that is
    all zero waits to be trained."""
    gone = weight.numel() - int(weight.count_nonzero())
    return LEAST * weight.numel() <= gone < weight.numel()


def keep_mask(score: Tensor, share: float, pattern: str, each: str) -> Tensor:
    """True where a weight stays; of equal scores the first ones go.

    score    [out, in]   not negative, float32 or float64
    share    of the weights that go, rounded down to whole weights or blocks; the groups' own for "2:4" and "4:8"
    pattern  "any"; "2:4" or "4:8": so many of every so many neighbours along the inputs; or "blocks" of 16
             outputs by 2 inputs, which go and stay whole
    each     what loses that share: a "row" of the weight (of blocks: 16 rows), or the whole "module"
    Asserts that groups divide the inputs: `sparsity.check_pattern` refuses other modules.
    """
    if pattern == "blocks":
        kept = keep_mask(_block_scores(score), share, "any", each)
        whole = kept.repeat_interleave(OUTPUTS, 0).repeat_interleave(INPUTS, 1)
        return whole[: score.shape[0], : score.shape[1]]
    if pattern in PATTERNS:
        gone, of = PATTERNS[pattern]
        assert score.shape[1] % of == 0, f"{score.shape[1]} inputs in groups of {of}"
        return spare_groups(score, gone, of)
    flat = score if each == "row" else score.reshape(1, -1)
    return keep_largest(flat, flat.shape[1] - int(share * flat.shape[1])).view(score.shape)


def spare_groups(score: Tensor, gone: int, of: int) -> Tensor:
    """True but for the `gone` least of every `of` neighbours along the inputs, [out, in] bool."""
    least = score.reshape(-1, of).argsort(dim=1, stable=True)[:, :gone]  # [out * in / of, gone]
    keep = torch.ones(least.shape[0], of, dtype=torch.bool, device=score.device).scatter_(1, least, False)
    return keep.view(score.shape)


def keep_largest(score: Tensor, kept: int) -> Tensor:
    """True at the `kept` largest of every row, [n, m] bool; of equal ones the last stay."""
    gone = score.shape[1] - kept
    if not gone or not kept:
        return torch.full_like(score, bool(kept), dtype=torch.bool)
    least = smallest(score, gone)
    keep = score >= least
    extra = _counts(keep) - kept  # of those at the threshold the first go, [n]
    for row in extra.nonzero()[:, 0].tolist():
        ties = _places(score[row] == least[row])[: int(extra[row])]
        keep[row, ties] = False
    return keep


def _counts(keep: Tensor) -> Tensor:
    """How many of every row stay, [n]; numpy counts ten times as fast as torch."""
    if keep.device.type != "cpu":
        return torch.count_nonzero(keep, 1)
    return torch.from_numpy(np.count_nonzero(keep.numpy(), axis=1))


def _places(row: Tensor) -> Tensor:
    return row.nonzero()[:, 0] if row.device.type != "cpu" else torch.from_numpy(np.flatnonzero(row.numpy()))


def magnitude(weight: Tensor) -> Tensor:
    """Of every number, float32 at least, in a tensor of its own."""
    return weight.abs() if weight.dtype in (torch.float32, torch.float64) else weight.float().abs_()


def masked(weight: Tensor, keep: Tensor) -> Tensor:
    """The weight with zeros where it does not stay: its bits times one or nothing, thrice as fast as a choice."""
    bits = _BITS.get(weight.dtype)
    if bits is None:
        return torch.where(keep, weight, 0.0)
    return (weight.view(bits) * keep).view(weight.dtype)


_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def smallest(score: Tensor, place: int) -> Tensor:
    """The `place`-th smallest of every row, counted from 1: [n, 1]."""
    if score.device.type != "cpu":
        return score.kthvalue(place, dim=1, keepdim=True).values
    found = np.partition(score.numpy(), place - 1, axis=1)[:, place - 1 : place]  # three times as fast as kthvalue
    return torch.from_numpy(found.copy())


def _block_scores(score: Tensor) -> Tensor:
    """Mean square of every block, so that a narrow one at the edge is not less for being narrow."""
    n, k = score.shape
    pad = (0, -k % INPUTS, 0, -n % OUTPUTS)
    total = nn.functional.pad(score.double().square(), pad)
    count = nn.functional.pad(torch.ones_like(score, dtype=torch.float64), pad)
    blocks = (-1, OUTPUTS, total.shape[1] // INPUTS, INPUTS)
    return total.reshape(blocks).sum((1, 3)) / count.reshape(blocks).sum((1, 3))
