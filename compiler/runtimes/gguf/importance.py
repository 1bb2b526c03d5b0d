"""llama.cpp's importance matrix: of every matrix, the mean square of what each column is multiplied with."""

import numpy as np
from torch import Tensor

from ...ir.program import Program
from ...transforms.search.layerwise import Layerwise, Norms, Stage, refuse_non_finite
from .shapes import gguf_shape_of, gguf_weight_name_by_linear_path

_LEAST = 1e-6  # of the mean: a column that is always zero counts this much, since ggml divides by sums of weights


def input_importance_by_gguf_name(program: Program, token_rows: Tensor) -> dict[str, np.ndarray]:
    """Mean square of each input of linear modules over rows of tokens, by llama.cpp's name of the weight, [in] float32.

    A module that no token reaches, or that is given zeros alone, has none. The embedding has none, nor a head that
    shares its weight.
    Raises Reject (not-a-number) where an input is no number.
    Source: `tools/imatrix` of llama.cpp, which sums squares of the model as it is in its file.
    """
    names = gguf_weight_name_by_linear_path(program.model, gguf_shape_of(program.model))
    squares, importance = Norms(), {}
    Layerwise(program, token_rows).run_and_observe_inputs(Stage("", tuple(names)), squares.accumulate)
    for path, sums in squares.sums.items():
        refuse_non_finite(path, sums)
        means = sums / token_rows.numel()
        if means.any():
            importance[names[path]] = means.clamp_min(_LEAST * float(means.mean())).float().numpy()
    return importance
