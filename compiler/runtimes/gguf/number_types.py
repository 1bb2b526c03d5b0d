"""Number types of tensors in a GGUF file: their blocks, and llama.cpp's choice of one for a matrix."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["layer", "table", "head"]


@dataclass(frozen=True)
class NumberType:
    """number  of the type in a file
    block   numbers of a row that share scales
    bytes   of a block
    """

    number: int
    block: int
    bytes: int

    @property
    def bytes_per_number(self) -> float:
        return self.bytes / self.block


TYPES = {
    "f32": NumberType(0, 1, 4),
    "f16": NumberType(1, 1, 2),
    "bf16": NumberType(30, 1, 2),
    "q8_0": NumberType(8, 32, 34),
    "q4_0": NumberType(2, 32, 18),
    "q4_1": NumberType(3, 32, 20),
    "q5_0": NumberType(6, 32, 22),
    "q5_1": NumberType(7, 32, 24),
    "q2_k": NumberType(10, 256, 84),
    "q3_k": NumberType(11, 256, 110),
    "q4_k": NumberType(12, 256, 144),
    "q5_k": NumberType(13, 256, 176),
    "q6_k": NumberType(14, 256, 210),
    "iq1_s": NumberType(19, 256, 50),
    "iq1_m": NumberType(29, 256, 56),
    "iq2_xxs": NumberType(16, 256, 66),
    "iq2_xs": NumberType(17, 256, 74),
    "iq2_s": NumberType(22, 256, 82),
    "iq3_xxs": NumberType(18, 256, 98),
    "iq3_s": NumberType(21, 256, 110),
    "iq4_nl": NumberType(20, 32, 18),
    "iq4_xs": NumberType(23, 256, 136),
}

# Type of a file, rounded by llama.cpp -> its name of such a file, of those with few other types beside it.
FILE_TYPES = {
    "q2_k": "MOSTLY_Q2_K",
    **{kind: f"MOSTLY_{kind.upper()}_S" for kind in ("q3_k", "q4_k", "q5_k")},
    **{kind: f"MOSTLY_{kind.upper()}" for kind in TYPES if kind == "q6_k" or kind.startswith("iq")},
}
# `tensor_requires_imatrix` of llama-quant.cpp; ggml's own list, `ggml_quantize_requires_imatrix`, is shorter.
NEED_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
_TABLES = dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"), "q2_k") | dict.fromkeys(("iq2_s", "iq3_xxs"), "iq3_s")
_FALLBACKS = {kind: "iq4_nl" for kind in TYPES if kind.startswith("iq")} | {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}


def type_of_matrix(file_type: str, row_length: int, role: Role) -> str:
    """llama.cpp's type of a matrix in a file of `file_type`, one of `FILE_TYPES`.

    row_length     numbers of a row of the matrix
    role         "head" makes the logits, a tied table of tokens too; "table" is an untied one

    Layers have the file's type, as under `llama-quantize --pure`; the head has more bits, and tables of tokens not
    fewer than two. A row that no blocks of 256 fill takes a type in blocks of 32, one that these don't fill float16.
    Source: `llama_tensor_get_type_impl` and `tensor_type_fallback` of llama.cpp, src/llama-quant.cpp. Its further
    rules, by layer and branch, are those of its mixtures (`Q4_K_M`), which are not written.
    """
    chosen = file_type
    if role == "head":
        chosen = "q5_k" if file_type in NEED_IMPORTANCE else "q6_k"
        if row_length % TYPES[chosen].block:
            chosen = "q8_0"
    elif role == "table":
        chosen = _TABLES.get(file_type, file_type)
    if row_length % TYPES[chosen].block:
        chosen = _FALLBACKS.get(chosen, "f16")
    return "f16" if row_length % TYPES[chosen].block else chosen
