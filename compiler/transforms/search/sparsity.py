"""Making zeros in the linear modules of a program: which modules may, which masks fit, and what is said of it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ....dsl.checker.inputs import PATTERNS, sparsity_pattern_diagnostics
from ....dsl.checker.skeleton import Part, Skeleton
from ....dsl.checker.values import Ratio, Selector
from ....dsl.syntax.diagnostics import Fault, Reject
from ...analysis.planning import shrink
from ...analysis.planning.selection import inner_parts
from ...ir.layers.linear import weight_of
from ...ir.surgery import replace_tensor_everywhere, tensor_at
from ...models.rows.forward import REMEDY, not_a_number
from ...plugin.interfaces import Lossy, Pass, param
from .masks import magnitude, masked_copy

if TYPE_CHECKING:
    from ...ir.program import Program
    from ...plugin.context import Context

tied_weight = Fault("tied-weight", "A pass is to make zeros in a weight that another module reads, too.")
ROWWISE = 3  # times the work of thresholds of whole modules

no_linear = Fault("no-linear", "A pass works on linear modules, and there is none for it.")


class Sparsifier(Pass):
    """Makes weights of linear modules zero."""

    keeps = Lossy()
    acts_on = "linear"
    changes: ClassVar[tuple[str, ...]] = ("weights",)
    divides = "pattern"
    determinism = "deterministic"

    sparsity: Ratio = param("Share of every output's weights that become zero.", of=("weights",), gt=0, lt=1)
    on: Selector | None = param("Linear modules; all inside the layers where it is left out.", default=None)
    pattern: Literal["any", "2:4", "4:8", "blocks"] = param(
        "Any weights; two of every four or four of every eight inputs of an output; or blocks of 16 outputs by 2 "
        "inputs, which run faster from 80% on.",
        default="any",
    )

    def forecast(self, skeleton: Skeleton) -> Skeleton:
        """Unchanged shapes, with zeros. Modules that the pattern doesn't fit are reported here, before any weight is
        read."""
        self.chosen(skeleton)
        return shrink.with_sparsity(skeleton, self.sparsity.value)

    def chosen(self, skeleton: Skeleton) -> tuple[Part, ...]:
        """The modules, which the pattern fits; Reject (unfit-pattern) where it does not."""
        selected = chosen_parts(skeleton, self.on)
        refuse_unsupported_pattern(selected, self.pattern, self.sparsity, vars(self).get("allocation", "uniform"))
        return selected


def chosen_parts(skeleton: Skeleton, selector: Selector | None) -> tuple[Part, ...]:
    """The linear modules that `selector` selects; without it those inside the layers. Reject shared weights."""
    parts = inner_parts(skeleton, selector)
    if not parts:
        raise no_linear(
            f"{skeleton.model_type} has no linear module that could be changed",
            help="name others with `on:`; packed ones stay as they are",
        ).rejection()
    for part in parts:
        same = next((names for names in skeleton.tied if f"{part.path}.weight" in names), None)
        if same:
            other = next(name for name in same if name != f"{part.path}.weight")
            raise tied_weight(
                f"{part.path}.weight is also {other}", help=f"leave it out of `on:`, as in `* - {part.path}`"
            ).rejection()
    return parts


def refuse_unsupported_pattern(
    parts: Sequence[Part], pattern: str, sparsity: Ratio, allocation: str = "uniform"
) -> None:
    """Reject (unfit-pattern) a pattern that the modules or the share of zeros don't allow."""
    if faults := sparsity_pattern_diagnostics(parts, pattern, sparsity, allocation):
        raise Reject(*faults)


def finite_weight(program: "Program", path: str) -> Tensor:
    """A linear module's weight [out, in]; Reject (not-a-number) where a number of it is none."""
    weight = weight_of(program.model.get_submodule(path))
    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
        raise not_a_number(f"{path}.weight holds NaN or infinite numbers", help=REMEDY).rejection()
    return weight


def weight_score(program: "Program", path: str, norms: Sequence[float]) -> Tensor:
    """Magnitude times the norm of the input, [out, in]; magnitude alone where the module was not run ([])."""
    score = magnitude(finite_weight(program, path))
    return score * torch.tensor(norms, device=score.device) if norms else score


@torch.no_grad()
def mask_weight(program: "Program", path: str, keep_mask: Tensor, ctx: "Context") -> float:
    """Zero what does not stay, in a tensor of its own; the share of zeros that the weight has now."""
    return replace_weight(program, path, masked_copy(weight_of(program.model.get_submodule(path)), keep_mask), ctx)


@torch.no_grad()
def replace_weight(program: "Program", path: str, weight: Tensor, ctx: "Context") -> float:
    """Put another weight [out, in] into a linear module; the share of zeros that it has.

    A large one goes to disk at once and is mapped, so that a pass over a whole model holds one module's.
    """
    module = program.model.get_submodule(path)
    weight = weight.to(tensor_at(module, "weight").dtype)
    stored = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    replace_tensor_everywhere(program.model, f"{path}.weight", ctx.map_from_cache(stored))
    return zero_share(weight)


def zero_share(weight: Tensor) -> float:
    """Share of zeros."""
    return 1.0 - int(weight.count_nonzero()) / weight.numel()


def relative_change(before: Tensor, after: Tensor) -> float:
    """Norm of the difference of two weights, as a share of the first one's norm."""
    norm = float(torch.linalg.vector_norm(before, dtype=torch.float32))
    return float(torch.linalg.vector_norm(after.to(before) - before, dtype=torch.float32)) / norm if norm else 0.0


def weight_count_by_path(selected: Sequence[Part]) -> dict[str, int]:
    """Number of weights of each module, by path."""
    return {part.path: n * k for part in selected for n, k in [dict(part.tensors)["weight"]]}


def mask_work(selected: Sequence[Part], pattern: str = "any", scope: str = "module") -> dict[str, float]:
    """Cost of computing masks, for `plan`: thresholds among all weights, or of every row, whose numbers are all
    partitioned, or the order in small groups."""
    numbers = float(sum(weight_count_by_path(selected).values()))
    return {"sort": numbers} if pattern in PATTERNS else {"select": numbers * (ROWWISE if scope == "row" else 1)}


def note_zero_shares(
    program: "Program", parts: Sequence[Part], zero_share_by_path: Mapping[str, float], **extra_facts: Any
) -> None:
    """Note in the program how much of every module, and of all together, is zero."""
    weights = weight_count_by_path(parts)
    overall = sum(zero_share_by_path[path] * weights[path] for path in zero_share_by_path) / sum(weights.values())
    program.changed()
    shares = {path: round(share, 4) for path, share in zero_share_by_path.items()}
    program.note(sparsity=round(overall, 4), zeros=shares, **extra_facts)
