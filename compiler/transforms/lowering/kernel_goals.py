"""Goals of the lines of `effc bench kernels`, on processors with vectors alone and on those with tiles.

A processor with AMX multiplies many rows at another rate, and torch is faster there; ratios that hold on one would be
beyond the memory or the ports of the other.
"""

from typing import TYPE_CHECKING

from .contenders import DYNAMIC, EAGER, GROUPED, PREPACKED

if TYPE_CHECKING:
    from .kernel_table import KernelRace, Table


class Vectors:
    """Goals of processors without AMX."""

    @staticmethod
    def add_gemv_goals(table: "Table", race: "KernelRace", label: str, sparsity: float) -> None:
        if sparsity > 0.5:
            goal = {0.7: 2.2, 0.8: 2.3, 0.9: 2.4}[sparsity]
            table.ratio(f"{label} sparse / own dense", race, "dense_linear", "sparse_linear", goal)
            return
        table.target(f"{label} dense, of read", race.of_read("dense_linear"), 0.85, 1)
        table.ratio(f"{label} dense / torch bf16", race, EAGER, "dense_linear", 3)
        table.target(f"{label} sparse, of read", race.of_read("sparse_linear"), 0.85, 1)
        table.ratio(f"{label} sparse / own dense", race, "dense_linear", "sparse_linear", 1.6)
        table.ratio(f"{label} sparse / torch bf16", race, EAGER, "sparse_linear", 5)
        table.ratio(f"{label} sparse / torch pre-packed", race, PREPACKED, "sparse_linear", 3)
        table.target(f"{label} sparse int8, of read", race.of_read("sparse_linear_int8"), 0.8, 1)
        table.ratio(f"{label} sparse int8 / torch dynamic int8", race, DYNAMIC, "sparse_linear_int8", 2.2)
        table.ratio(f"{label} sparse int8 / torch bf16", race, EAGER, "sparse_linear_int8", 9)

    @staticmethod
    def rows(table: "Table", line: "KernelRace", count: int) -> None:
        goal = {2: 3.5, 4: 3, 8: 2.3, 16: 1.6}[count]
        table.ratio(f"{count} rows sparse / torch bf16", line, EAGER, "sparse_linear", goal)
        table.ratio(f"{count} rows sparse / torch pre-packed", line, PREPACKED, "sparse_linear", 1)

    @staticmethod
    def prefill(table: "Table", line: "KernelRace") -> None:
        table.ratio("512 rows sparse / torch bf16 (oneDNN)", line, EAGER, "sparse_linear", 0.95)
        table.ratio("512 rows sparse / pre-packed oneDNN", line, PREPACKED, "sparse_linear", 0.95)

    @staticmethod
    def attention(table: "Table", line: "KernelRace", label: str) -> None:
        table.ratio(f"{label} dense", line, GROUPED, "dense_attention", 3.5)
        table.ratio(f"{label} sparse 50%", line, GROUPED, "sparse_attention", 5)


class Tiles:
    """Goals of processors with AMX."""

    @staticmethod
    def add_gemv_goals(table: "Table", race: "KernelRace", label: str, sparsity: float) -> None:
        goal = {0.5: 0.85, 0.7: 0.8, 0.8: 0.75, 0.9: 0.65}[sparsity]
        table.target(f"{label} sparse, of read", race.of_read("sparse_linear"), goal, 1)
        if sparsity == 0.5:
            table.target(f"{label} dense, of read", race.of_read("dense_linear"), 0.85, 1)
            table.target(f"{label} dense int8, of read", race.of_read("dense_linear_int8"), 0.85, 1)
            table.target(f"{label} sparse int8, of read", race.of_read("sparse_linear_int8"), 0.8, 1)

    @staticmethod
    def rows(table: "Table", line: "KernelRace", count: int) -> None:
        table.ratio(f"{count} rows sparse / torch bf16", line, EAGER, "sparse_linear", 1.5)

    @staticmethod
    def prefill(table: "Table", line: "KernelRace") -> None:
        for kernel, goal in (("dense_linear", 0.95), ("sparse_linear", 0.9)):
            name = "dense" if kernel == "dense_linear" else "sparse"
            table.ratio(f"512 rows {name} / torch bf16 (oneDNN)", line, EAGER, kernel, goal)
            table.ratio(f"512 rows {name} / pre-packed oneDNN", line, PREPACKED, kernel, goal)
            table.ratio(f"512 rows {name}, int8 / bf16", line, kernel, f"{kernel}_int8", 1.7)

    @staticmethod
    def attention(table: "Table", line: "KernelRace", label: str) -> None:
        table.target(f"{label} dense, of read", line.of_read("dense_attention"), 0.8, 1)
        table.target(f"{label} sparse 50%, of read", line.of_read("sparse_attention"), 0.8, 1)
