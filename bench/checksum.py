"""Print how fast a native artifact's weights are checked while they are loaded, GB/s.

    python -m bench.checksum [--mebibytes N] [--threads N]

`plain` are embeddings, norms and tables, held against sha256 in the plan; `packed` are the layers, whose own hash and
masks are read by one thread each. `read` is what memory gives one: a sum over as many bytes. Each is the best of five; with one
thread by processor time, so that a machine which others use says what a thread can do, with more by the clock.
"""

import argparse
import hashlib
import time

import torch
from effc.compiler.runtimes.native import opening, plan_files
from effc.kernels import packed

GOAL = 2.0  # GB/s


def best_gb_per_second(call, n_bytes: int, clock=time.process_time) -> float:
    """GB/s of the fastest of five calls over `n_bytes` bytes."""
    took = []
    for _ in range(5):
        started = clock()
        call()
        took.append(clock() - started)
    return n_bytes / min(took) / 1e9


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--mebibytes", type=int, default=128)
    asked.add_argument("--threads", type=int, default=1, help="that check plain weights")
    given = asked.parse_args()
    count, clock = given.mebibytes << 20, time.process_time if given.threads == 1 else time.perf_counter
    torch.set_num_threads(1)
    plain = torch.randint(0, 255, (count,), dtype=torch.uint8).view(torch.float32)
    whole = memoryview(plain.view(torch.uint8).numpy())
    entries = {"w": {"sha256": [hashlib.sha256(piece).hexdigest() for piece in plan_files.pieces(whole)]}}
    rows = {"read": (lambda: plain.view(torch.int64).sum(), count)}
    rows["plain"] = (lambda: opening.verify_weight_contents({"w": plain}, entries, given.threads), count)
    for kernel in ("dense_linear", "sparse_linear"):
        weight = torch.randn(2048, count // 4 // 2048)
        weight *= torch.rand_like(weight) < 0.5
        held = packed.pack(kernel, weight, 1)
        rows[f"packed {kernel}"] = (
            lambda held=held: packed.check_packed_weight(packed.kernel_of(held), held.view(-1)),
            held.numel(),
        )
    for name, (call, of) in rows.items():
        speed = best_gb_per_second(call, of, clock)
        print(f"{name:<24} {speed:6.2f} GB/s{'' if name == 'read' or speed >= GOAL else f'   below {GOAL:g}'}")


if __name__ == "__main__":
    main()
