"""Matrices of a GGUF file rounded by llama.cpp, and how far they are off."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ...core.events import iterate_and_report
from .llama_quantizer import LlamaQuantizer, running_llama_quantizer
from .number_types import NEED_IMPORTANCE, Role, type_of_matrix
from .refusal import incompatible_type, refuse_beyond_float16

_NUMBERS = 1 << 20  # that are compared at once
Importance = Mapping[str, np.ndarray]


@dataclass
class RoundedMatrices:
    """Matrices of a file by their types, and their errors.

    kind    of the file
    counts  matrices of each type
    errors  of each matrix: root mean square over that of the weights, columns weighted by importance
    """

    kind: str
    counts: Counter[str] = field(default_factory=Counter)
    errors: dict[str, float] = field(default_factory=dict)

    def round(
        self, name: str, matrix: np.ndarray, type_name: str, importance: np.ndarray | None, quantizer: LlamaQuantizer
    ) -> np.ndarray:
        """Bytes of a matrix [n, k], [n, bytes of a row]. Raises Reject (unfit-type) where nothing of it is left."""
        import gguf

        if importance is None and type_name in NEED_IMPORTANCE:  # no token reaches it
            importance = np.ones(matrix.shape[1], np.float32)
        number_type = getattr(gguf.GGMLQuantizationType, type_name.upper())
        if type_name == "f16":
            refuse_beyond_float16(name, matrix)
            raw = gguf.quants.quantize(matrix, number_type)
        else:
            raw = quantizer.quantize(name, matrix, type_name, importance)
        error = relative_error(matrix, gguf.quants.dequantize(raw, number_type), importance)
        if not error < 1:
            raise incompatible_type(
                f"{name} in `{type_name}` is off by {error:.0%} of its root mean square, so that nothing of it is left",
                help="write a type of more bits",
            ).rejection()
        self.counts[type_name] += 1
        self.errors[name] = error
        return raw

    def note(self) -> str:
        """Sentence for a person: types and errors."""
        types = f"{self.counts[self.kind]} of {self.counts.total()} matrices of the GGUF file are `{self.kind}`"
        if others := [f"{count} `{kind}`" for kind, count in self.counts.most_common() if kind != self.kind]:
            types += f", others {', '.join(others)}: head, embedding, and rows that no blocks fill, as llama.cpp has it"
        worst, errors = max(self.errors, key=lambda name: self.errors[name]), list(self.errors.values())
        return (
            f"{types}. Weights are off by {np.median(errors):.1%} of root mean squares in the median matrix, "
            f"by {self.errors[worst]:.1%} in {worst}."
        )


def add_rounded_tensors(
    writer: Any,
    tensors: Iterable[tuple[str, Tensor]],
    tensor_count: int,
    file_type: str,
    is_head_tied: bool,
    importance: Importance,
) -> RoundedMatrices:
    """Add every tensor, vectors in float32 and matrices in llama.cpp's type for each in a file of `file_type`.

    tensor_count   of tensors, about
    is_head_tied   the head is the table of tokens
    importance  [in] of matrices by name, as llama.cpp's importance matrix has them
    Raises Reject (package-missing, unfit-type).
    """
    import gguf

    rounded = RoundedMatrices(file_type)
    with running_llama_quantizer() as quantizer:
        for name, tensor in iterate_and_report(tensors, "quantising", tensor_count):
            array = tensor.detach().float().contiguous().cpu().numpy()
            if array.ndim == 1:
                writer.add_tensor(name, array)
            else:
                matrix_type = type_of_matrix(file_type, array.shape[1], matrix_role(name, is_head_tied))
                raw = rounded.round(name, array, matrix_type, importance.get(name), quantizer)
                writer.add_tensor(name, raw, raw_dtype=getattr(gguf.GGMLQuantizationType, matrix_type.upper()))
    return rounded


def matrix_role(gguf_name: str, is_head_tied: bool) -> Role:
    if gguf_name == "output.weight" or (is_head_tied and gguf_name == "token_embd.weight"):
        return "head"
    return "table" if gguf_name == "token_embd.weight" else "layer"


def relative_error(matrix: np.ndarray, approximation: np.ndarray, importance: np.ndarray | None) -> float:
    """Root mean square of the error over that of the matrix, columns weighted by their importance; 0 of zeros."""
    weights = np.ones(matrix.shape[1]) if importance is None else importance.astype(np.float64)
    n_parts = 1 + matrix.size // _NUMBERS
    squares = error = 0.0
    for part, other in zip(np.array_split(matrix, n_parts), np.array_split(approximation, n_parts), strict=True):
        squares += float(np.square(part, dtype=np.float64).sum(0) @ weights)
        error += float(np.square(other - part, dtype=np.float64).sum(0) @ weights)
    return (error / squares) ** 0.5 if squares else error
