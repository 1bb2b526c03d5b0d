"""Kernels against their targets, as ratios of interleaved calls in one process with cold weights.

    python tests/bench/kernels.py [--only gemv,block,rows,prefill,attention,pack] [--seconds 0.3] [--threads 2]

Every contender of a line is called in turn, in alternating order, over copies of its weights that together
exceed the last cache, so that each call reads memory. A sample counts if no thread of this process was pre-
empted in it (`ru_nivcsw`); the others are thrown away and counted. Bursts are short, with real-time priority
where the system allows, and other work gets as long in between. Times on a shared machine are noise: only
ratios of one line count, and the read bound measured inside that line.
"""

import argparse
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from effc.compiler.environment import processor_name
from effc.kernels import levels, native, packed
from effc.kernels.cache import Cache
from effc.kernels.ops import KERNELS
from torch.nn.functional import linear, scaled_dot_product_attention

COLD = 160 << 20          # bytes of copies that are cycled through
BURST = 0.05              # seconds of one burst


@dataclass
class Contender:
    """Something timed: one callable per copy of its weights, and the bytes that one call must read."""

    name: str
    calls: list[Callable[[], object]]
    bytes: int = 0
    kept: list[float] = field(default_factory=list)
    thrown: int = 0

    @property
    def seconds(self) -> float:
        return statistics.median(self.kept)


def preempted() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def real_time(on: bool) -> bool:
    """Raise or lower all threads of this process; false where the system does not allow it."""
    policy, parameter = (os.SCHED_FIFO, os.sched_param(1)) if on else (os.SCHED_OTHER, os.sched_param(0))
    try:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), policy, parameter)
    except (OSError, AttributeError):
        return False
    return True


def race(contenders: list[Contender], seconds: float, allow_real_time: bool) -> None:
    """Call all in turn until each was called for its share of `seconds`."""
    for c in contenders:
        c.calls[0]()
    turn, until = 0, time.perf_counter() + seconds * len(contenders) * 8
    busy = 0.0
    while (busy < seconds * len(contenders) and time.perf_counter() < until) or turn < 6:
        raised = allow_real_time and real_time(True)
        begun = time.perf_counter()
        while time.perf_counter() - begun < BURST:
            for c in contenders if turn % 2 else contenders[::-1]:
                call = c.calls[turn % len(c.calls)]
                before, start = preempted(), time.perf_counter()
                call()
                took = time.perf_counter() - start
                if preempted() == before:
                    c.kept.append(took)
                else:
                    c.thrown += 1
            turn += 1
        busy += time.perf_counter() - begun
        if raised:
            real_time(False)
        time.sleep(BURST)
    for c in contenders:
        if not c.kept:
            c.kept, c.thrown = [float("nan")], c.thrown


def copies(make: Callable[[], object], bytes: int) -> list:
    return [make() for _ in range(max(2, min(64, -(-COLD // max(bytes, 1)))))]


def sparse(n: int, k: int, sparsity: float, block: bool = False) -> torch.Tensor:
    """Random weights with this share of zeros, in 16 by 2 blocks where asked."""
    generator = torch.Generator().manual_seed(n + k)
    w = torch.randn(n, k, generator=generator)
    if block:
        keep = torch.rand(-(-n // 16), -(-k // 2), generator=generator) >= sparsity
        keep = keep.repeat_interleave(16, 0).repeat_interleave(2, 1)[:n, :k]
    else:
        keep = torch.rand(n, k, generator=generator) >= sparsity
    return (w * keep).bfloat16()


def ours(kernel: str, w: torch.Tensor, x: torch.Tensor, label: str = "") -> Contender:
    first = KERNELS[kernel].pack(w)

    def again() -> torch.Tensor:
        own = packed.room(first.numel())
        own.copy_(first)
        packed.check(kernel, own, len(w))
        return own

    held = copies(again, first.numel())
    op = getattr(torch.ops.effc, kernel).default
    calls = [lambda p=p: op(x, p, None, len(w)) for p in held]
    return Contender(label or kernel, calls, first.numel())


def eager(w: torch.Tensor, x: torch.Tensor) -> Contender:
    held = copies(w.clone, w.numel() * 2)
    return Contender("torch bf16", [lambda p=p: linear(x, p) for p in held], w.numel() * 2)


def prepacked(w: torch.Tensor, x: torch.Tensor) -> Contender:
    """What inductor's freezing gives: oneDNN's own layout, made once for these rows."""
    held = copies(lambda: torch.ops.mkldnn._reorder_linear_weight(w.clone(), len(x)), w.numel() * 2)
    op = torch.ops.mkldnn._linear_pointwise
    return Contender("torch pre-packed", [lambda p=p: op(x, p, None, "none", [], "") for p in held], w.numel() * 2)


def dynamic_int8(w: torch.Tensor, x: torch.Tensor) -> Contender:
    torch.backends.quantized.engine = "x86"
    scale = float(w.abs().max()) / 127
    quantised = torch.quantize_per_tensor(w.float(), scale, 0, torch.qint8)
    held = copies(lambda: torch.ops.quantized.linear_prepack(quantised, None), w.numel())
    wide = x.float()
    op = torch.ops.quantized.linear_dynamic
    return Contender("torch int8 dynamic", [lambda p=p: op(wide, p, reduce_range=False) for p in held], w.numel())


def roof(bytes: int, threads: int) -> Contender:
    """Reading as many bytes and doing nothing with them."""
    held = copies(lambda: packed.room(bytes).fill_(1), bytes)
    call, level = native.function("read"), levels.code()
    return Contender("read", [lambda p=p: call(level, p.data_ptr(), bytes, threads) for p in held], bytes)


def grouped_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    """What a torch user may write for one token: the query heads of a key head as rows."""
    rows = q.view(1, k.shape[1], -1, k.shape[3])
    held = copies(lambda: (k.clone(), v.clone()), k.numel() * 4)
    return Contender("torch grouped rows", [lambda p=p: scaled_dot_product_attention(rows, *p) for p in held],
                     k.numel() * 4)


def cached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: float) -> Contender:
    def filled() -> Cache:
        cache = Cache(k.shape[1], k.shape[3], k.shape[2], 1, (keep, keep), window=64)
        cache.append(k, v)
        return cache

    held = copies(filled, k.numel() * 4)
    return Contender("dense_attention" if keep == 1 else "sparse_attention", [lambda c=c: c.attend(q) for c in held],
                     held[0].bytes)


class Table:
    """Lines as they are measured, and the targets that they meet or miss."""

    def __init__(self, seconds: float, threads: int, allow_real_time: bool):
        self.seconds, self.threads, self.allow = seconds, threads, allow_real_time
        self.met: list[tuple[str, float, float]] = []

    def line(self, title: str, contenders: list[Contender], bound: int = 0) -> dict[str, Contender]:
        """Race contenders, print each; with `bound` bytes the read roofline beside them."""
        if bound:
            contenders = [*contenders, roof(bound, self.threads)]
        race(contenders, self.seconds, self.allow)
        first, last = contenders[0], contenders[-1]
        rate = last.bytes / last.seconds if bound else 0.0
        print(f"\n{title}" + (f"   read {rate / 1e9:.1f} GB/s" if bound else ""))
        for c in contenders:
            share = f"{c.bytes / c.seconds / rate:6.2f} of read" if bound else " " * 14
            print(f"  {c.name:<22}{c.seconds * 1e6:10.1f} us {first.seconds / c.seconds:7.2f} x {first.name}  {share}"
                  f"  kept {len(c.kept)}, thrown {c.thrown}")
        return {c.name: c for c in contenders}

    def target(self, text: str, found: float, wanted: float) -> None:
        self.met.append((text, found, wanted))

    def close(self) -> None:
        print("\ntargets")
        for text, found, wanted in self.met:
            print(f"  {'met   ' if found >= wanted else 'MISSED'} {text:<66} {found:6.2f}  target {wanted}")


def of_read(found: dict[str, Contender], name: str) -> float:
    return found[name].bytes / found[name].seconds / (found["read"].bytes / found["read"].seconds)


def ratio(found: dict[str, Contender], slower: str, name: str) -> float:
    return found[slower].seconds / found[name].seconds


def gemv(table: Table, shapes: list[tuple[int, int]]) -> None:
    for n, k in shapes:
        for sparsity in (0.5, 0.7, 0.8, 0.9) if (n, k) == (2048, 8192) else (0.5,):
            w, x = sparse(n, k, sparsity), torch.randn(1, k).bfloat16()
            half = ours("sparse_linear", w, x)
            found = table.line(f"{n} x {k}, {sparsity:.0%} zeros, 1 row", [
                eager(w, x), prepacked(w, x), dynamic_int8(w, x), ours("dense_linear", w, x), half,
                ours("dense_linear_int8", w, x), ours("sparse_linear_int8", w, x)], half.bytes)
            of_gemv(table, found, f"{n} x {k} {sparsity:.0%}", sparsity)


def of_gemv(table: Table, found: dict[str, Contender], at: str, sparsity: float) -> None:
    if sparsity > 0.5:
        table.target(f"{at} sparse / own dense", ratio(found, "dense_linear", "sparse_linear"),
                     {0.7: 2.2, 0.8: 2.3, 0.9: 2.4}[sparsity])
        return
    table.target(f"{at} dense, of read", of_read(found, "dense_linear"), 0.85)
    table.target(f"{at} dense / torch bf16", ratio(found, "torch bf16", "dense_linear"), 3)
    table.target(f"{at} sparse, of read", of_read(found, "sparse_linear"), 0.85)
    table.target(f"{at} sparse / own dense", ratio(found, "dense_linear", "sparse_linear"), 1.6)
    table.target(f"{at} sparse / torch bf16", ratio(found, "torch bf16", "sparse_linear"), 5)
    table.target(f"{at} sparse / torch pre-packed", ratio(found, "torch pre-packed", "sparse_linear"), 3)
    table.target(f"{at} sparse int8, of read", of_read(found, "sparse_linear_int8"), 0.8)
    table.target(f"{at} sparse int8 / torch dynamic int8", ratio(found, "torch int8 dynamic", "sparse_linear_int8"), 2.2)
    table.target(f"{at} sparse int8 / torch bf16", ratio(found, "torch bf16", "sparse_linear_int8"), 9)


def blocks(table: Table) -> None:
    for sparsity, wanted in ((0.8, 14), (0.9, 25)):
        w, x = sparse(2048, 8192, sparsity, block=True), torch.randn(1, 8192).bfloat16()
        own = ours("block_sparse_linear", w, x)
        found = table.line(f"2048 x 8192, {sparsity:.0%} of 16x2 blocks zero, 1 row",
                           [eager(w, x), ours("dense_linear", w, x), own], own.bytes)
        table.target(f"block 16x2 {sparsity:.0%} / torch bf16", ratio(found, "torch bf16", "block_sparse_linear"), wanted)


def rows(table: Table) -> None:
    for count, wanted in ((2, 3.5), (4, 3), (8, 2.3), (16, 1.6)):
        w, x = sparse(2048, 8192, 0.5), torch.randn(count, 8192).bfloat16()
        found = table.line(f"2048 x 8192, 50% zeros, {count} rows", [
            eager(w, x), prepacked(w, x), ours("dense_linear", w, x), ours("sparse_linear", w, x)])
        table.target(f"{count} rows sparse / torch bf16", ratio(found, "torch bf16", "sparse_linear"), wanted)
        table.target(f"{count} rows sparse / torch pre-packed", ratio(found, "torch pre-packed", "sparse_linear"), 1)


def prefill(table: Table) -> None:
    for n, k, count in ((2048, 8192, 32), (2048, 8192, 512), (1536, 576, 256)):
        w, x = sparse(n, k, 0.5), torch.randn(count, k).bfloat16()
        found = table.line(f"{n} x {k}, 50% zeros, {count} rows", [
            eager(w, x), prepacked(w, x), dynamic_int8(w, x), ours("dense_linear", w, x), ours("sparse_linear", w, x),
            ours("sparse_linear_int8", w, x)])
        if count == 512:
            table.target("512 rows sparse / torch bf16 (oneDNN)", ratio(found, "torch bf16", "sparse_linear"), 0.95)
            table.target("512 rows sparse / pre-packed oneDNN", ratio(found, "torch pre-packed", "sparse_linear"), 0.95)


def attention(table: Table) -> None:
    for heads, group, d, count in ((8, 4, 128, 4096), (8, 4, 64, 8192), (3, 3, 64, 2048)):
        k, v = (torch.randn(1, heads, count, d).bfloat16() for _ in range(2))
        q = torch.randn(1, heads * group, d).bfloat16()
        half = cached(q, k, v, 0.5)
        at = f"{heads} key heads, {group} query heads each, {d} dimensions, {count} tokens"
        found = table.line(f"{at}, 50% kept", [grouped_rows(q, k, v), cached(q, k, v, 1.0), half], half.bytes)
        table.target(f"attention {count} x {d} dense", ratio(found, "torch grouped rows", "dense_attention"), 3.5)
        table.target(f"attention {count} x {d} sparse 50%", ratio(found, "torch grouped rows", "sparse_attention"), 5)


def packing(table: Table) -> None:
    w = sparse(4096, 4096, 0.5)
    contenders = [Contender(name, [lambda name=name: KERNELS[name].pack(w, table.threads)], w.numel() * 2)
                  for name in packed.KINDS]
    found = table.line("packing 4096 x 4096", contenders)
    for name, c in found.items():
        table.target(f"packing {name}, GB/s of bfloat16", c.bytes / c.seconds / 1e9, 1)


PARTS = {"gemv": lambda t: gemv(t, SHAPES), "block": blocks, "rows": rows, "prefill": prefill,
         "attention": attention, "pack": packing}
SHAPES = [(2048, 8192), (4096, 4096), (8192, 2048), (1536, 576), (576, 1536), (576, 576), (49152, 576), (1000, 777)]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    flags.add_argument("--seconds", type=float, default=0.3, help="of measuring, for each contender")
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--no-real-time", action="store_true", help="don't ask for real-time priority in bursts")
    chosen = flags.parse_args()
    torch.set_num_threads(chosen.threads)
    raised = not chosen.no_real_time and real_time(True) and real_time(False)
    print(f"{processor_name()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}; "
          f"torch {torch.__version__}; kernels {levels.why()}; {chosen.threads} threads; "
          f"{'real-time' if raised else 'ordinary'} bursts; load {os.getloadavg()[0]:.1f}")
    table = Table(chosen.seconds, chosen.threads, raised)
    with torch.inference_mode():
        for part in chosen.only.split(","):
            PARTS[part](table)
    table.close()


if __name__ == "__main__":
    main()
