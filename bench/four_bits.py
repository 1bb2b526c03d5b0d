"""Print how fast four bits are multiplied beside eight: kernels called in turns, one thread, the shortest call of each.

    python -m bench.four_bits [--rows 1 16 120 512] [--groups 32 64 128] [--calls 100]

Rows are bfloat16 and rounded within the call. A ratio above one says that four bits are faster.
"""

import argparse
import time
from typing import Any

import torch

SHAPES = [(1536, 576), (576, 1536), (2048, 2048)]


def int4_and_int8_microseconds(
    weight_shape: tuple[int, int], rows: int, group: int, n_calls: int
) -> tuple[float, float]:
    """Microseconds of int4 and of int8."""
    from effc.kernels.ops import LINEARS

    chance = torch.Generator().manual_seed(0)
    four: Any
    eight: Any
    four, eight = LINEARS["dense_linear_int4"], LINEARS["dense_linear_int8"]
    weight = torch.randn(*weight_shape, generator=chance) * 0.02
    x = torch.randn(rows, weight_shape[1], generator=chance).bfloat16()
    players = [(four, four.pack(weight, group_size=group)), (eight, eight.pack(weight))]
    least = [float("inf")] * 2
    for _ in range(n_calls):
        for i, (kernel, packed) in enumerate(players):
            started = time.perf_counter()
            kernel.native(x, packed, None, weight_shape[0])
            least[i] = min(least[i], time.perf_counter() - started)
    return least[0] * 1e6, least[1] * 1e6


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 120, 512])
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    line = "{:<14}{:>6}{:>7}{:>12}{:>12}{:>9}"
    print(line.format("weight", "rows", "group", "int4, us", "int8, us", "int8/int4"), flush=True)
    for shape in SHAPES:
        for rows in options.rows:
            for group in options.groups:
                own, other = int4_and_int8_microseconds(shape, rows, group, options.calls)
                cells = (f"{shape[0]} x {shape[1]}", rows, group, f"{own:.0f}", f"{other:.0f}", f"{other / own:.2f}")
                print(line.format(*cells), flush=True)


if __name__ == "__main__":
    main()
