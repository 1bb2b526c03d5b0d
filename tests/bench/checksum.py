"""Print how fast a native artifact's weights are checked while they are loaded, GB/s of one thread.

    python tests/bench/checksum.py [--mebibytes N]

`plain` are embeddings, norms and tables, held against sha256 in the plan; `packed` are the layers, whose own hash and
masks are read. `read` is what memory gives: a sum over as many bytes. Each is the best of five, by processor time, so
that a machine which others use says what a thread can do.
"""

import argparse
import hashlib
import time

import torch
from effc.compiler.native import opening
from effc.kernels import packed

GOAL = 2.0  # GB/s of one thread


def best(call, count: int) -> float:
    """GB/s of the fastest of five calls over `count` bytes."""
    took = []
    for _ in range(5):
        started = time.process_time()
        call()
        took.append(time.process_time() - started)
    return count / min(took) / 1e9


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--mebibytes", type=int, default=128)
    count = asked.parse_args().mebibytes << 20
    torch.set_num_threads(1)
    plain = torch.randint(0, 255, (count,), dtype=torch.uint8).view(torch.float32)
    sha = hashlib.sha256(memoryview(plain.view(torch.uint8).numpy())).hexdigest()
    rows = {"read": (lambda: plain.view(torch.int64).sum(), count)}
    rows["plain"] = (lambda: opening.check({"w": plain}, {"w": {"sha256": sha}}, 1), count)
    for kernel in ("dense_linear", "sparse_linear"):
        weight = torch.randn(2048, count // 4 // 2048)
        weight *= torch.rand_like(weight) < 0.5
        held = packed.pack(kernel, weight, 1)
        rows[f"packed {kernel}"] = (lambda held=held: packed.check(packed.kernel_of(held), held.view(-1)), held.numel())
    for name, (call, of) in rows.items():
        speed = best(call, of)
        print(f"{name:<24} {speed:6.2f} GB/s{'' if name == 'read' or speed >= GOAL else f'   below {GOAL:g}'}")


if __name__ == "__main__":
    main()
