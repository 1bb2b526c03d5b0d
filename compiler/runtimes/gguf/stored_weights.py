"""A model of transformers with the numbers that a GGUF file holds of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .engine import FILE
from .facts import gguf_rejection
from .reading import GgufFile, read_gguf
from .shapes import gguf_shape_of, is_rotary, names_with_gguf_names, separate_rotary_rows


@contextmanager
def with_weights_of_gguf(model: Any, folder: Path) -> Iterator[None]:
    """Inside, matrices of the model are those of the file, dequantised, in the model's dtype.

    A file of few bits is far from the model that it was written of, and says little when it is compared with that. It
    is compared with what its numbers compute where transformers has them.
    Raises Reject (refused-gguf) where a matrix of the file is further from the model's than zeros are: other numbers
    than those of this model, or in another order.
    """
    stored, shape = read_gguf(folder / FILE), gguf_shape_of(model)
    originals: dict[nn.Parameter, Tensor] = {}
    try:
        for name, gguf_name in names_with_gguf_names(model, shape):
            parameter = model.get_parameter(name)
            if parameter.dim() == 2:
                tensor = stored.read_tensor(gguf_name)
                if is_rotary(gguf_name, shape):
                    tensor = separate_rotary_rows(tensor, shape.head_dim)
                original = originals.setdefault(parameter, parameter.data)
                _refuse_unlike(tensor, original.float(), gguf_name, stored)
                parameter.data = tensor.to(parameter.dtype)
        yield
    finally:
        for parameter, original in originals.items():
            parameter.data = original


def _refuse_unlike(stored_matrix: Tensor, original: Tensor, name: str, file: GgufFile) -> None:
    if original.any() and not (stored_matrix - original).norm() < original.norm():
        raise gguf_rejection(file, f"holds other numbers as `{name}` than those that it was written of")
