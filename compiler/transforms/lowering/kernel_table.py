"""The kernels against their targets, as ratios within races."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ....kernels import levels, packed
from ....kernels.ops import LINEARS
from ...core.fingerprint import machine_facts
from ...ir.layers.number_formats import NUMBER_FORMATS
from .contenders import (
    EAGER,
    PREPACKED,
    available_torch_contenders,
    cached_attention_contender,
    eager_linear_contender,
    grouped_rows_contender,
    kernel_contender,
    memory_read_contender,
    random_weight,
)
from .kernel_goals import Tiles, Vectors
from .racing import Contender, race_and_record_times, try_set_real_time_priority

SHAPES = [(2048, 8192), (4096, 4096), (8192, 2048), (1536, 576), (576, 1536), (576, 576), (49152, 576), (1000, 777)]


@dataclass(frozen=True)
class KernelRace:
    """One race. `rate`: bytes per second of plain reading in it, 0 where that did not take part."""

    title: str
    contenders: tuple[Contender, ...]
    rate: float

    @property
    def named(self) -> dict[str, Contender]:
        return {c.name: c for c in self.contenders}

    def ratio(self, slower: str, name: str) -> float:
        return self.named[slower].seconds / self.named[name].seconds

    def of_read(self, name: str) -> float:
        """Share of the read roofline that a contender reaches."""
        contender = self.named[name]
        return contender.bytes / contender.seconds / self.rate

    def allowed(self, slower: str, name: str) -> float | None:
        """The ratio if a contender took no longer than reading its bytes; None where reading was not raced."""
        return self.named[slower].seconds * self.rate / self.named[name].bytes if self.rate else None

    def as_table_text(self) -> str:
        first = self.contenders[0]
        lines = [
            self.title + (f"   read {self.rate / 1e9:.1f} GB/s" if self.rate else ""),
            f"{'us':>34}{'x ' + first.name:>22}{'of read' if self.rate else '':>10}{'kept':>8}{'thrown':>8}",
        ]
        for c in self.contenders:
            share = f"{self.of_read(c.name):.2f}" if self.rate else ""
            lines.append(
                f"  {c.name:<22}{c.seconds * 1e6:10.1f}{first.seconds / c.seconds:22.2f}{share:>10}"
                f"{len(c.times):8}{len(c.thrown):8}"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "name": c.name,
                "us": round(c.seconds * 1e6, 2),
                "bytes": c.bytes,
                "kept": len(c.times),
                "thrown": len(c.thrown),
                "of_read": round(self.of_read(c.name), 4) if self.rate else None,
            }
            for c in self.contenders
        ]
        read = round(self.rate / 1e9, 2) if self.rate else None
        return {"title": self.title, "read_gb_per_s": read, "rows": rows}


@dataclass(frozen=True)
class Target:
    """A figure that a line reached, what it is to be at least, and the most that memory allowed in that race."""

    text: str
    figure: float
    ratio: float
    allowed: float | None = None

    @property
    def met(self) -> bool:
        return self.figure >= self.ratio

    @property
    def beyond(self) -> bool:
        """Whether no kernel could have met it: reading the bytes alone took too long."""
        return not self.met and self.allowed is not None and self.allowed < self.ratio

    @property
    def line(self) -> str:
        bound = "" if self.met or self.allowed is None else f"memory allows {self.allowed:.2f}"
        return (
            f"  {'met   ' if self.met else 'MISSED'} {self.text:<52}{self.figure:6.2f} of {self.ratio:<5}"
            f"{bound}{', less than the target' if self.beyond else ''}"
        ).rstrip()

    def to_json(self) -> dict[str, Any]:
        allowed = None if self.allowed is None else round(self.allowed, 3)
        return {
            "text": self.text,
            "found": round(self.figure, 3),
            "wanted": self.ratio,
            "met": self.met,
            "memory_allows": allowed,
        }


def goals_summary(targets: Sequence[Target]) -> str:
    """The targets line by line, and how many of them are met or could have been."""
    missed, beyond = sum(not t.met for t in targets), sum(t.beyond for t in targets)
    end = f"{len(targets) - missed} of {len(targets)} targets met"
    if beyond:
        end += f"; {beyond} of the {missed} missed ask for more than memory allows here"
    return "\n".join(["targets", *(t.line for t in targets), end])


@dataclass
class Table:
    """Lines as they are measured, told to `on_line`, and the targets that they meet or miss."""

    seconds: float = 0.3
    threads: int = 2
    real_time: bool = True
    on_line: Callable[[KernelRace], None] = lambda line: None
    goals: type[Vectors] | type[Tiles] = field(default_factory=lambda: _goals())
    lines: list[KernelRace] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def run_race_and_add_line(
        self, title: str, contenders: Sequence[Contender], read_roofline_bytes: int = 0
    ) -> KernelRace:
        """Race contenders; with `read_roofline_bytes` bytes the read roofline beside them."""
        contenders = [
            *contenders,
            *([memory_read_contender(read_roofline_bytes, self.threads)] if read_roofline_bytes else []),
        ]
        race_and_record_times(contenders, self.seconds, self.real_time)
        last = contenders[-1]
        result = KernelRace(title, tuple(contenders), last.bytes / last.seconds if read_roofline_bytes else 0.0)
        for c in contenders:
            c.calls.clear()  # frees the copies
        self.lines.append(result)
        self.on_line(result)
        return result

    def add_goal(self, text: str, value: float, goal: float, allowed: float | None = None) -> None:
        self.targets.append(Target(text, value, goal, allowed))

    def add_ratio_goal(self, text: str, line: KernelRace, slower: str, name: str, goal: float) -> None:
        """A target for how many times as fast as another a contender of a line is, where torch has that other here."""
        if all(c.name != slower for c in line.contenders):
            return
        self.add_goal(text, line.ratio(slower, name), goal, line.allowed(slower, name))

    def measure_parts(self, part_names: Sequence[str], weight_shapes: Sequence[tuple[int, int]] = SHAPES) -> None:
        """Measure these of `PARTS`, with this many threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                for part in part_names:
                    PARTS[part](self, weight_shapes)
        finally:
            torch.set_num_threads(before)


def _goals() -> type[Vectors] | type[Tiles]:
    """Goals of the level that kernels run at."""
    return Tiles if levels.active_level() in ("amx", levels.MODEL) else Vectors


def table_environment(table: Table) -> dict[str, Any]:
    """Machine and settings of a table."""
    raised = table.real_time and try_set_real_time_priority(True) and try_set_real_time_priority(False)
    return {
        **machine_facts(),
        "threads": table.threads,
        "kernels": levels.active_level_and_reason(),
        "bursts": "real-time" if raised else "ordinary",
        "load": round(os.getloadavg()[0], 1),
    }


def measure_gemv(table: Table, weight_shapes: Sequence[tuple[int, int]]) -> None:
    for n, k in weight_shapes:
        for sparsity in (0.5, 0.7, 0.8, 0.9) if (n, k) == (2048, 8192) else (0.5,):
            w, x = random_weight(n, k, sparsity), torch.randn(1, k).bfloat16()
            half = kernel_contender("sparse_linear", w, x)
            line = table.run_race_and_add_line(
                f"{n} x {k}, {sparsity:.0%} zeros, 1 row",
                [*available_torch_contenders(w, x), half, *_contenders_of_formats(w, x, excluded_kernel=half.name)],
                half.bytes,
            )
            table.goals.add_gemv_goals(table, line, f"{n} x {k} {sparsity:.0%}", sparsity)


def _contenders_of_formats(w: torch.Tensor, x: torch.Tensor, excluded_kernel: str = "") -> list[Contender]:
    """Contenders of all number formats but blocks, which want zeros in blocks, and a kernel that takes part already."""
    kernels = [
        format.kernel for format in NUMBER_FORMATS if format.skips != "blocks" and format.kernel != excluded_kernel
    ]
    return [kernel_contender(kernel, w, x) for kernel in kernels]


def measure_block_sparse(table: Table, _shapes: object) -> None:
    for sparsity, goal in ((0.8, 14), (0.9, 25)):
        w, x = random_weight(2048, 8192, sparsity, zeros_in_blocks=True), torch.randn(1, 8192).bfloat16()
        block_contender = kernel_contender("block_sparse_linear", w, x)
        line = table.run_race_and_add_line(
            f"2048 x 8192, {sparsity:.0%} of 16x2 blocks zero, 1 row",
            [eager_linear_contender(w, x), kernel_contender("dense_linear", w, x), block_contender],
            block_contender.bytes,
        )
        table.add_ratio_goal(f"block 16x2 {sparsity:.0%} / torch bf16", line, EAGER, "block_sparse_linear", goal)


def measure_several_rows(table: Table, _shapes: object) -> None:
    for count in (2, 4, 8, 16):
        w, x = random_weight(2048, 8192, 0.5), torch.randn(count, 8192).bfloat16()
        half = kernel_contender("sparse_linear", w, x)
        line = table.run_race_and_add_line(
            f"2048 x 8192, 50% zeros, {count} rows",
            [*available_torch_contenders(w, x, (PREPACKED,)), kernel_contender("dense_linear", w, x), half],
            half.bytes,
        )
        table.goals.add_row_goals(table, line, count)


def measure_prefill(table: Table, _shapes: object) -> None:
    for n, k, count in ((2048, 8192, 32), (2048, 8192, 512), (1536, 576, 256)):
        w, x = random_weight(n, k, 0.5), torch.randn(count, k).bfloat16()
        line = table.run_race_and_add_line(
            f"{n} x {k}, 50% zeros, {count} rows", [*available_torch_contenders(w, x), *_contenders_of_formats(w, x)]
        )
        if count == 512:
            table.goals.add_prefill_goals(table, line)


def measure_attention(table: Table, _shapes: object) -> None:
    for heads, group, d, count in ((8, 4, 128, 4096), (8, 4, 64, 8192), (3, 3, 64, 2048)):
        k, v = (torch.randn(1, heads, count, d).bfloat16() for _ in range(2))
        q = torch.randn(1, heads * group, d).bfloat16()
        half = cached_attention_contender(q, k, v, 0.5)
        at = f"{heads} key heads, {group} query heads each, {d} dimensions, {count} tokens"
        line = table.run_race_and_add_line(
            f"{at}, 50% kept",
            [grouped_rows_contender(q, k, v), cached_attention_contender(q, k, v, 1.0), half],
            half.bytes,
        )
        table.goals.add_attention_goals(table, line, f"attention {count} x {d}")


def measure_packing(table: Table, _shapes: object) -> None:
    w = random_weight(4096, 4096, 0.5)
    contenders = [Contender(name, [partial(LINEARS[name].pack, w, table.threads)], w.nbytes) for name in packed.KINDS]
    for c in table.run_race_and_add_line("packing 4096 x 4096", contenders).contenders:
        table.add_goal(f"packing {c.name}, GB/s of bfloat16", c.bytes / c.seconds / 1e9, 1)


PARTS: dict[str, Callable[[Table, Any], None]] = {
    "gemv": measure_gemv,
    "block": measure_block_sparse,
    "rows": measure_several_rows,
    "prefill": measure_prefill,
    "attention": measure_attention,
    "pack": measure_packing,
}
