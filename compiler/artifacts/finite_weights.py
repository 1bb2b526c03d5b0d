"""Whether all weights of an artifact are numbers: a compile writes no others, so NaN or infinity was put there since.

Hashes can't tell: whoever changes weights can write them anew.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ..core.quantity import count_text
from .load import target_class
from .manifest import Manifest

if TYPE_CHECKING:
    from torch import Tensor

weights_not_finite = Fault(
    "weights-not-finite",
    "Weights of an artifact hold NaN or infinity.\n\n"
    "A compile refuses a model that has such weights, and reopens what it wrote: they came to be afterwards, and "
    "hashes that fit were written beside them. A mask of 0 and minus infinity is none.",
    exit="environment",
)


def refuse_non_finite_weights(artifact: Path, manifest: Manifest) -> None:
    """Raises Reject (weights-not-finite) with the tensors of an artifact that hold NaN or infinity; its forms were
    checked before."""
    tensors = target_class(manifest.kind).tensors
    faults = [
        _non_finite_diagnostic(artifact / file, name, x)
        for file in manifest.files
        for name, x in tensors(artifact / file)
        if not _is_finite_or_mask(x)
    ]
    if faults:
        raise Reject(*faults)


def _non_finite_diagnostic(file: Path, name: str, x: "Tensor") -> Diagnostic:
    count = int((~x.float().isfinite()).sum())
    return weights_not_finite(
        f"{file}: `{name}` holds {count_text(count, 'value')} NaN or infinite",
        help="compile again, or fetch the artifact again from somebody whom you trust",
    )


def _is_finite_or_mask(x: "Tensor") -> bool:
    """Whether a tensor is of numbers, or is a mask, or one infinite bound."""
    if not x.is_floating_point() or not x.numel():
        return True
    x = x if x.element_size() > 1 else x.float()  # 8 bits have no order in torch
    if all(end.isfinite() for end in x.aminmax()):
        return True
    if x.isnan().any():
        return False
    finite = x[x.isfinite()]
    return x.numel() == 1 or bool(len(finite) and not finite.any() and (x <= 0).all())
