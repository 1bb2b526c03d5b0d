"""Rejections of the target `gguf`, on writing and on reading."""

import numpy as np

from ....dsl.syntax.diagnostics import Fault

cannot_write_gguf = Fault(
    "cannot-write-gguf",
    "A recipe asks for a GGUF file of a model that llama.cpp can't hold.\n\n"
    "Llama, Mistral, Qwen2 and 3, Gemma 1 to 3, Phi 1 to 4, StableLM, GLM-4, Granite, OLMo 2, SmolLM3, Cohere 1 and 2 "
    "and StarCoder2 are written under their own architecture where all layers are alike, and Llama and Mistral as "
    "`deci` where layers have widths, heads or branches of their own. `hf`, `native` and `onnx` hold the others.",
    exit="environment",
)
incompatible_type = Fault(
    "unfit-type",
    "A recipe asks for a GGUF file of numbers that its model's weights are not.\n\n"
    "`q4_0` and `q4_1` keep codes of four bits that a step gave, and round nothing; `q8_0` has blocks of 32, and "
    "float16 ends at 65504. K- and I-types are rounded by llama.cpp, which has no codes for infinite numbers.",
)
quantizer_killed = Fault(
    "quantiser-killed",
    "The process of llama.cpp's quantiser was killed from outside, as Linux does where memory runs out.",
    exit="resources",
)
rejected_gguf = Fault(
    "refused-gguf",
    "A GGUF file holds something that effc's own don't, or is cut.\n\n"
    "It may come from anybody: sizes, names and offsets are held against the file before anything is read by them.",
    exit="environment",
)

INSTEAD = "`hf` and `native` hold it, and `onnx` where its layers keep no state"


def refuse_beyond_float16(name: str, array: np.ndarray) -> None:
    """Reject (unfit-type) numbers that are infinite, none, or beyond what float16 holds."""
    if not abs(array).max(initial=0) <= np.finfo(np.float16).max:
        raise incompatible_type(f"{name} has numbers that float16 has not", help="write `type: bf16`").rejection()
