"""What `compiler/transforms/lowering/speed.py` estimates from: the pace of a thread at this machine's level.

    python -m bench.pace

Nanoseconds that 32 weights take each kernel where memory is no limit: the fastest of many calls on a weight that the
second cache holds, less those of a tiny one. And what torch reads of weights that no cache holds, GB a second.
"""

import statistics
import time

import torch
from effc.compiler.transforms.lowering.contenders import random_weight
from effc.compiler.transforms.lowering.racing import cold_copies
from effc.kernels import levels
from effc.kernels.ops import LINEARS
from torch.nn.functional import linear

LINEAR = list(LINEARS)
N, K, ROWS = 256, 2048, (1, 8, 16, 32, 64, 512)


def fastest_call(call, times: int = 300) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def seconds(kernel: str, n: int, k: int, rows: int, zeros: float) -> float:
    packed = LINEARS[kernel].pack(random_weight(n, k, zeros, zeros_in_blocks=kernel.startswith("block")))
    x = torch.randn(rows, k).bfloat16()
    return fastest_call(lambda: LINEARS[kernel].call_op_or_kernel(x, packed, None, n))


def main() -> None:
    torch.set_num_threads(1)
    print(f"level {levels.active_level()}, one thread; ns for 32 weights, by rows of x: {', '.join(map(str, ROWS))}")
    for kernel in LINEAR:
        for zeros in (0.5, 0.9) if kernel.startswith("block") else (0.5,):
            each = [(seconds(kernel, N, K, r, zeros) - seconds(kernel, 16, 64, r, zeros)) / (N * K / 32) for r in ROWS]
            print(f"{kernel:<24}{zeros:4.0%} zero" + "".join(f"{1e9 * e:9.2f}" for e in each))
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(4096, 4096).to(dtype)
        held, x = cold_copies(weight.clone, weight.nbytes), torch.randn(1, 4096).to(dtype)
        took = statistics.median(fastest_call(lambda w=w, x=x: linear(x, w), 1) for w in held * 2)
        print(f"torch {str(dtype).removeprefix('torch.'):<16}{weight.nbytes / took / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
