"""Machine profiles: what a `profile` block may say of the machine that a bound holds for."""

from .vocabulary import Param

ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "neon")

MAX_THREADS = 1024  # more than processors have, and no more than any system starts

KEYS = (
    Param("isa", ("choice",), "Instruction set that the machine must have.", None, choices=ISAS),
    Param("threads", ("int",), "Threads that measurements run with.", None, ge=1, le=MAX_THREADS, unit="threads"),
    Param("memory", ("bytes",), "Memory that a run may use.", None, gt=0),
    Param("device", ("choice",), "Device that the model runs on.", None, choices=("cpu", "cuda")),
)


def profile_key_param(name: str) -> Param | None:
    return next((k for k in KEYS if k.name == name), None)
