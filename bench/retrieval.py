"""CPU milliseconds of one search in a knowledge base, by the number of its vectors: `python -m bench.retrieval`.

Vectors are clustered, 384 numbers each, as those of MiniLM; one thread; the time of the thread, so that what else the
machine does counts little.
"""

import time

import torch
from effc.compiler.apps.rttc.selection import SELECTIONS

WIDTH, COUNT, QUERIES = 384, 8, 40


def vectors(rows: int) -> torch.Tensor:
    centres = torch.randn(max(1, rows // 100), WIDTH)
    noise = 0.5 * torch.randn(rows, WIDTH)
    return torch.nn.functional.normalize(centres[torch.randint(len(centres), (rows,))] + noise, dim=-1)


def milliseconds(search, query: torch.Tensor, base: torch.Tensor) -> float:
    started = time.thread_time()
    search(query, base, COUNT)
    return (time.thread_time() - started) * 1000


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for rows in (1_000, 10_000, 100_000):
        base = vectors(rows)
        for name, search in SELECTIONS.items():
            found = sorted(milliseconds(search, base[7 * i], base) for i in range(QUERIES + 5))[:-5]
            print(f"{rows:>7} {name:8} p50 {found[QUERIES // 2]:6.1f} ms  p95 {found[QUERIES * 95 // 100]:6.1f} ms")


if __name__ == "__main__":
    main()
