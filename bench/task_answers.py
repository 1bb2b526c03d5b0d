"""Table of bench/pruned_tasks.py: means over seeds, and paired intervals over questions."""

import math
from statistics import fmean
from typing import Any

from bench.paired import Z, bits_of, paired_difference

TASKS = {"ARC-Easy": True, "ARC-Challenge": True, "openbookqa": True, "boolq": False}  # by characters of an option?
AVERAGED = ("ARC-Easy", "ARC-Challenge", "openbookqa")  # without passages the whole model answers boolq below chance
TEXTS = ("docs", "kjv", "code")


def answers(row: dict[str, Any], task: str) -> list[int]:
    return bits_of(row[task], row[f"{task} questions"])


def mean_difference(a: list[dict], b: list[dict]) -> tuple[float, float]:
    """Mean over averaged tasks of the difference in accuracy, and half its paired 95 % interval over questions.

    Seeds that both have are averaged first: the interval is for these, and says nothing of others.
    """
    seeds = {row["seed"] for row in a} & {row["seed"] for row in b}
    a, b = ([row for row in rows if row["seed"] in seeds] for rows in (a, b))
    parts = [paired_difference(*([answers(row, task) for row in rows] for rows in (a, b))) for task in AVERAGED]
    return fmean(mean for mean, _ in parts), Z * math.hypot(*(error for _, error in parts)) / len(parts)


def spread(values: list[float], digits: int) -> str:
    low, high = (f"{f(values):.{digits}f}" for f in (min, max))
    return f"{fmean(values):.{digits}f}" + (f" ({low}–{high})" if low != high else "")


def pruned_task_rows(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lines of the table: means over seeds with their range, and the last column's interval beside `racing`."""
    lines = [("removed", "method", "seeds", "params", *TEXTS, *TASKS, "mean of the first three", "`racing` less this")]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["share"], row["heal"], row["method"]), []).append(row)
    for (share, heal, method), group in sorted(groups.items(), key=lambda item: item[0][:2]):
        accuracies = {task: [fmean(answers(row, task)) for row in group] for task in TASKS}
        means = [fmean(values) for values in zip(*(accuracies[task] for task in AVERAGED), strict=True)]
        rival = groups.get((share, heal, "racing"))
        gap = ""
        if rival and method not in ("racing", "original"):
            value, half = mean_difference(rival, group)
            gap = f"{100 * value:+.1f} ± {100 * half:.1f}"
        lines.append(
            (
                f"{share:.0%}" + (", healed" if heal else ""),
                method,
                f"{len(group)}",
                f"{fmean(row['params'] for row in group) / 1e6:.1f} M",
                *(spread([row[name] for row in group], 1) for name in TEXTS),
                *(spread([100 * v for v in accuracies[task]], 1) for task in TASKS),
                spread([100 * v for v in means], 1),
                gap,
            )
        )
    return lines
