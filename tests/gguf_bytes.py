"""Tensors of GGUF files in any of its types, without a quantiser."""

import numpy as np


def random_codes(kind: str, rows: int, row: int, seed: int = 0) -> np.ndarray:
    """Bytes of a matrix in a type. Bytes below 32 make every half that they hold a small number, whatever the type."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return np.random.default_rng(seed).integers(0, 32, (rows, row // block * size), np.uint8)


def dequantized(kind: str, raw: np.ndarray) -> np.ndarray:
    import gguf

    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()])
