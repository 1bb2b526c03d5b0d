"""Which weights of linear modules become zero: the least by a score, as many of every row or module."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...dsl.diagnostics import Fault, Reject
from ...dsl.skeleton import Part, Skeleton
from ...dsl.values import Selector
from ..ir.edits import is_below
from ..ir.surgery import put
from ..layers.linear import weight_of
from ..planning.select import parts
from ..rows.forward import LOOK, not_a_number

if TYPE_CHECKING:
    from ..ir.program import Program

OUTPUTS, INPUTS = 16, 2           # of a block: one vector of the kernel `block_sparse_linear`

tied_weight = Fault("tied-weight", "A pass is to make zeros in a weight that another module reads, too.")
no_linear = Fault("no-linear", "A pass works on linear modules, and there is none for it.")


def chosen_parts(skeleton: Skeleton, on: Selector | None) -> tuple[Part, ...]:
    """The linear modules that `on` selects; without it those inside the layers. Reject shared weights."""
    found = parts(skeleton, on)
    if on is None:
        found = tuple(p for p in found if any(is_below(p.path, unit) for unit in skeleton.units))
    if not found:
        raise Reject(no_linear(f"{skeleton.model_type} has no linear module that could be changed",
                               help="name others with `on:`; packed ones stay as they are"))
    for part in found:
        same = next((names for names in skeleton.tied if f"{part.path}.weight" in names), None)
        if same:
            other = next(name for name in same if name != f"{part.path}.weight")
            raise Reject(tied_weight(f"{part.path}.weight is also {other}",
                                     help=f"leave it out of `on:`, as in `* - {part.path}`"))
    return found


def keep_mask(score: Tensor, share: float, pattern: str, each: str) -> Tensor:
    """True where a weight stays; of equal scores the first ones go.

    score    [out, in]   not negative
    share    of the weights that go, rounded to whole weights or blocks
    pattern  "any", or "blocks" of 16 outputs by 2 inputs, which go and stay whole
    each     what loses that share: a "row" of the weight (of blocks: 16 rows), or the whole "module"
    """
    if pattern == "blocks":
        kept = keep_mask(_block_scores(score), share, "any", each)
        whole = kept.repeat_interleave(OUTPUTS, 0).repeat_interleave(INPUTS, 1)
        return whole[:score.shape[0], :score.shape[1]]
    flat = score if each == "row" else score.reshape(1, -1)
    gone = round(share * flat.shape[1])
    keep = torch.ones_like(flat, dtype=torch.bool)
    if gone:
        least = flat.argsort(dim=1, stable=True)[:, :gone]
        keep.scatter_(1, least, False)
    return keep.view(score.shape)


def _block_scores(score: Tensor) -> Tensor:
    """Mean square of every block, so that a narrow one at the edge is not less for being narrow."""
    n, k = score.shape
    pad = (0, -k % INPUTS, 0, -n % OUTPUTS)
    total = nn.functional.pad(score.double().square(), pad)
    count = nn.functional.pad(torch.ones_like(score, dtype=torch.float64), pad)
    blocks = (-1, OUTPUTS, total.shape[1] // INPUTS, INPUTS)
    return total.reshape(blocks).sum((1, 3)) / count.reshape(blocks).sum((1, 3))


def finite_weight(program: "Program", path: str) -> Tensor:
    """A linear module's weight [out, in]; Reject (not-a-number) where a number of it is none."""
    weight = weight_of(program.model.get_submodule(path))
    if not weight.isfinite().all():
        raise Reject(not_a_number(f"{path}.weight holds NaN or infinite numbers", help=LOOK))
    return weight


@torch.no_grad()
def mask(program: "Program", path: str, keep: Tensor) -> float:
    """Zero what does not stay, in a tensor of its own; the share of zeros that the weight has now."""
    module = program.model.get_submodule(path)
    weight = torch.where(keep, weight_of(module), 0.0).to(module.weight.dtype)
    put(program.model, f"{path}.weight", weight.T.contiguous() if isinstance(module, Conv1D) else weight)
    return zeros(weight)


def zeros(weight: Tensor) -> float:
    """Share of zeros."""
    return 1.0 - int(weight.count_nonzero()) / weight.numel()


def note(program: "Program", chosen: Sequence[Part], found: dict[str, float], **more: Any) -> None:
    """Say of every module, and of all together, how much of it is zero."""
    sizes = {part.path: dict(part.tensors)["weight"] for part in chosen}
    weights = {path: n * k for path, (n, k) in sizes.items()}
    whole = sum(found[path] * weights[path] for path in found) / sum(weights.values())
    program.changed()
    shares = {path: round(share, 4) for path, share in found.items()}
    program.note(sparsity=round(whole, 4), zeros=shares, **more)
