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
    def add_gemv_goals(table: "Table", race: "KernelRace", shape_label: str, sparsity: float) -> None:
        if sparsity > 0.5:
            goal = {0.7: 2.2, 0.8: 2.3, 0.9: 2.4}[sparsity]
            table.add_ratio_goal(f"{shape_label} sparse / own dense", race, "dense_linear", "sparse_linear", goal)
            return
        table.add_goal(f"{shape_label} dense, of read", race.of_read("dense_linear"), 0.85, 1)
        table.add_ratio_goal(f"{shape_label} dense / torch bf16", race, EAGER, "dense_linear", 3)
        table.add_goal(f"{shape_label} sparse, of read", race.of_read("sparse_linear"), 0.85, 1)
        table.add_ratio_goal(f"{shape_label} sparse / own dense", race, "dense_linear", "sparse_linear", 1.6)
        table.add_ratio_goal(f"{shape_label} sparse / torch bf16", race, EAGER, "sparse_linear", 5)
        table.add_ratio_goal(f"{shape_label} sparse / torch pre-packed", race, PREPACKED, "sparse_linear", 3)
        table.add_goal(f"{shape_label} sparse int8, of read", race.of_read("sparse_linear_int8"), 0.8, 1)
        table.add_ratio_goal(
            f"{shape_label} sparse int8 / torch dynamic int8", race, DYNAMIC, "sparse_linear_int8", 2.2
        )
        table.add_ratio_goal(f"{shape_label} sparse int8 / torch bf16", race, EAGER, "sparse_linear_int8", 9)

    @staticmethod
    def add_row_goals(table: "Table", race: "KernelRace", row_count: int) -> None:
        goal = {2: 3.5, 4: 3, 8: 2.3, 16: 1.6}[row_count]
        table.add_ratio_goal(f"{row_count} rows sparse / torch bf16", race, EAGER, "sparse_linear", goal)
        table.add_ratio_goal(f"{row_count} rows sparse / torch pre-packed", race, PREPACKED, "sparse_linear", 1)

    @staticmethod
    def add_prefill_goals(table: "Table", race: "KernelRace") -> None:
        table.add_ratio_goal("512 rows sparse / torch bf16 (oneDNN)", race, EAGER, "sparse_linear", 0.95)
        table.add_ratio_goal("512 rows sparse / pre-packed oneDNN", race, PREPACKED, "sparse_linear", 0.95)

    @staticmethod
    def add_attention_goals(table: "Table", race: "KernelRace", shape_label: str) -> None:
        table.add_ratio_goal(f"{shape_label} dense", race, GROUPED, "dense_attention", 3.5)
        table.add_ratio_goal(f"{shape_label} sparse 50%", race, GROUPED, "sparse_attention", 5)


class Tiles:
    """Goals of processors with AMX."""

    @staticmethod
    def add_gemv_goals(table: "Table", race: "KernelRace", shape_label: str, sparsity: float) -> None:
        goal = {0.5: 0.85, 0.7: 0.8, 0.8: 0.75, 0.9: 0.65}[sparsity]
        table.add_goal(f"{shape_label} sparse, of read", race.of_read("sparse_linear"), goal, 1)
        if sparsity == 0.5:
            table.add_goal(f"{shape_label} dense, of read", race.of_read("dense_linear"), 0.85, 1)
            table.add_goal(f"{shape_label} dense int8, of read", race.of_read("dense_linear_int8"), 0.85, 1)
            table.add_goal(f"{shape_label} sparse int8, of read", race.of_read("sparse_linear_int8"), 0.8, 1)

    @staticmethod
    def add_row_goals(table: "Table", race: "KernelRace", row_count: int) -> None:
        table.add_ratio_goal(f"{row_count} rows sparse / torch bf16", race, EAGER, "sparse_linear", 1.5)

    @staticmethod
    def add_prefill_goals(table: "Table", race: "KernelRace") -> None:
        for kernel, goal in (("dense_linear", 0.95), ("sparse_linear", 0.9)):
            name = "dense" if kernel == "dense_linear" else "sparse"
            table.add_ratio_goal(f"512 rows {name} / torch bf16 (oneDNN)", race, EAGER, kernel, goal)
            table.add_ratio_goal(f"512 rows {name} / pre-packed oneDNN", race, PREPACKED, kernel, goal)
            table.add_ratio_goal(f"512 rows {name}, int8 / bf16", race, kernel, f"{kernel}_int8", 1.7)

    @staticmethod
    def add_attention_goals(table: "Table", race: "KernelRace", shape_label: str) -> None:
        table.add_goal(f"{shape_label} dense, of read", race.of_read("dense_attention"), 0.8, 1)
        table.add_goal(f"{shape_label} sparse 50%, of read", race.of_read("sparse_attention"), 0.8, 1)
