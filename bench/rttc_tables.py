"""What policies make of the answers that `rttc.py` collected: `python -m bench.rttc_tables FOLDER [SVG]`.

By task the accuracy of each branch and of an oracle, and what rewards tell. Then policies over all tasks' test
questions; thresholds, router and the rewards' scale see dev questions alone. Differences are to the better of always
`rag` and always `ttt`, over paired questions, with 95 % intervals of a bootstrap. A policy holds what RTTC claims where
it is at least as accurate as that one (mean not below 0, interval not below -0.05) and cheaper (interval below 0).
"""

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from effc.compiler.apps.rttc.calibration import auc_by_branch
from effc.compiler.apps.rttc.drawing import svg_accuracy_chart
from effc.compiler.apps.rttc.policy import BRANCHES, Point, Trial, calibrate_thresholds, simulate_policy
from effc.compiler.apps.rttc.router import Router, features
from effc.compiler.apps.rttc.router import train_router as router_of
from effc.compiler.apps.rttc.scaling import fit_platt_scaling, scaling_improves_accuracy
from effc.compiler.apps.rttc.scorer import auc
from effc.compiler.apps.rttc.signals import Signals

DRAWS, SEED = 10_000, 1
LEAST = 8  # dev and test questions of a task that has a table of its own
PRICES = (0.0, 0.01, 0.03)  # accuracy that a second of CPU is worth
# A direct answer goes on from the look at its question, and costs no more for it than one token's forward.
PARTS = {
    "direct": ("signals", "direct"),
    "rag": ("embed", "retrieve", "rag"),
    "ttt": ("embed", "retrieve", "train", "ttt"),
}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What a policy does, question by question: whether it is right, CPU seconds, and the branch that answers."""

    right: list[float]
    cost: list[float]
    taken: list[str]


def always(rows: Sequence[Row], branch: str) -> Result:
    cost = [sum(row["cost"][part] for part in PARTS[branch]) for row in rows]
    return Result([row["right"][branch] for row in rows], cost, [branch] * len(rows))


def random_branch_result(rows: Sequence[Row]) -> Result:
    """Equal shares, as expected of each question."""
    each = [always(rows, branch) for branch in BRANCHES]
    right, cost = (
        [statistics.fmean(v) for v in zip(*w, strict=True)] for w in ([e.right for e in each], [e.cost for e in each])
    )
    return Result(right, cost, [BRANCHES[i % 3] for i in range(len(rows))])


def oracle_accuracy(rows: Sequence[Row]) -> Result:
    """The cheapest branch that is right, without paying for finding it; the cheapest where none is."""
    taken = [next((b for b in BRANCHES if row["right"][b]), "direct") for row in rows]
    cost = [always([row], branch).cost[0] for row, branch in zip(rows, taken, strict=True)]
    return Result([row["right"][b] for row, b in zip(rows, taken, strict=True)], cost, taken)


def trials_of(rows: Sequence[Row], reward: str) -> list[Trial]:
    """As a sequential policy spends: it embeds first, and scores every answer."""
    own = {"direct": ("embed", *PARTS["direct"]), "rag": ("retrieve", "rag"), "ttt": ("train", "ttt")}
    return [
        Trial(row[reward], row["right"], {b: sum(row["cost"][p] for p in (*own[b], f"{reward} {b}")) for b in BRANCHES})
        for row in rows
    ]


def threshold_policy_result(
    dev: Sequence[Row], test: Sequence[Row], reward: str, price_per_second: float, kind: str, scaled: bool = True
) -> Result:
    """By thresholds of dev questions; `scaled` may compare chances in place of rewards, as a compile does."""
    known = trials_of(dev, reward)
    scales = fit_platt_scaling(known) if scaled else {}
    chosen = calibrate_thresholds(known, price_per_second, scales=scales)[0]
    kept = chosen.scales if kind != "best" else scales if scaled and scaling_improves_accuracy(known, scales) else {}
    chosen = replace(chosen, kind=kind, scales=kept)
    found = [simulate_policy(trial, chosen) for trial in trials_of(test, reward)]
    right = [row["right"][branch] for row, (branch, _) in zip(test, found, strict=True)]
    return Result(right, [seconds for _, seconds in found], [branch for branch, _ in found])


def of(rows: Sequence[Row]) -> torch.Tensor:
    """What a router sees of questions."""
    return torch.stack([features(torch.tensor(row["vector"]), Signals(**row["signals"])) for row in rows])


def router_result(dev: Sequence[Row], test: Sequence[Row], price_per_second: float | None) -> tuple[Result, Router]:
    fixed = {branch: always(dev, branch) for branch in BRANCHES}
    plain = [Trial(row["self"], row["right"], {b: fixed[b].cost[i] for b in BRANCHES}) for i, row in enumerate(dev)]
    router = router_of(plain, of(dev), price_per_second, force=True)
    taken = [router.branch(row) for row in of(test)]
    paid = ("embed", "signals") if router.needs_signals else ("embed",)
    cost = [sum(row["cost"][part] for part in {*paid, *PARTS[branch]}) for row, branch in zip(test, taken, strict=True)]
    return Result([row["right"][b] for row, b in zip(test, taken, strict=True)], cost, list(taken)), router


def bootstrap_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and the 95 % interval of a bootstrap over questions."""
    values = torch.tensor(differences, dtype=torch.float64)
    draw = torch.Generator().manual_seed(SEED)
    means = values[torch.randint(len(values), (DRAWS, len(values)), generator=draw)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.mean()), low, high


def accuracy_and_cost_gaps(
    result: Result, baseline: Result
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Of accuracy and of cost."""
    pairs = ((result.right, baseline.right), (result.cost, baseline.cost))
    right, cost = ([float(a) - float(b) for a, b in zip(*pair, strict=True)] for pair in pairs)
    return bootstrap_interval(right), bootstrap_interval(cost)


def p95_seconds(seconds: Sequence[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, round(0.95 * len(seconds)))]


def by_task(rows: Sequence[Row], rewards: Sequence[str]) -> Iterator[str]:
    """Branches are told of dev questions too: they learn nothing of them."""
    yield "| task | questions | direct | rag | ttt | oracle | " + " | ".join(f"AUC of `{r}`" for r in rewards) + " |"
    yield "|" + "---|" * (6 + len(rewards))
    names = list(dict.fromkeys(row["task"] for row in rows))
    for name in [*names, "all"]:
        own = [row for row in rows if name in (row["task"], "all")]
        told = [f"{statistics.fmean(always(own, b).right):.2f}" for b in BRANCHES]
        told.append(f"{statistics.fmean(oracle_accuracy(own).right):.2f}")
        for reward in rewards:
            every = [(row[reward][b], row["right"][b]) for row in own for b in BRANCHES]
            told.append(f"{auc([s for s, _ in every], [r for _, r in every]):.2f}")
        yield f"| {name} | {len(own)} | " + " | ".join(told) + " |"
    yield "\n| branch | mean CPU s | p95 |\n|---|---|---|"
    for branch in BRANCHES:
        cost = always(rows, branch).cost
        yield f"| {branch} | {statistics.fmean(cost):.2f} | {p95_seconds(cost):.2f} |"
    for part in ("embed", "retrieve", "signals", "train", *(f"{r} direct" for r in rewards)):
        cost = [row["cost"][part] for row in rows]
        yield f"| of which {part} | {statistics.fmean(cost):.3f} | {p95_seconds(cost):.3f} |"


def policy_results(dev: Sequence[Row], test: Sequence[Row], rewards: Sequence[str]) -> Iterator[tuple[str, Result]]:
    yield from ((f"always {branch}", always(test, branch)) for branch in BRANCHES)
    yield "random, equal shares", random_branch_result(test)
    for reward in rewards:
        area = f"`{reward}` (AUC on dev {auc_by_branch(trials_of(dev, reward))['all']:.2f})"
        for name, scaled in (("rewards", False), ("chances", True)):
            yield f"best of all by {name}, {area}", threshold_policy_result(dev, test, reward, 0.0, "best", scaled)
        for price in PRICES[:2]:
            yield (
                f"sequential, {area}, {price:g} a second",
                threshold_policy_result(dev, test, reward, price, "sequential"),
            )
    for price in (None, *PRICES):
        result, router = router_result(dev, test, price)
        said = f"{router.price:.2g} (the default)" if price is None else f"{price:g}"
        seen = "vector and signals" if router.needs_signals else "vector alone"
        yield f"router, {seen} (AUC {router.auc:.2f}, held out), {said} a second", result
    yield "oracle", oracle_accuracy(test)


def table_rows(dev: Sequence[Row], test: Sequence[Row], rewards: Sequence[str]) -> Iterator[str]:
    results = dict(policy_results(dev, test, rewards))
    worth = {name: (statistics.fmean(r.right), -statistics.fmean(r.cost)) for name, r in results.items()}
    better = max(("always rag", "always ttt"), key=worth.__getitem__)
    yield f"\n{len(dev)} dev and {len(test)} test questions; the better of both is {better}\n"
    yield "| policy | accuracy | CPU s | direct, rag, ttt | accuracy less the better's | CPU s less | claim |"
    yield "|---|---|---|---|---|---|---|"
    for name, result in results.items():
        shares = ", ".join(f"{result.taken.count(b) / len(test):.0%}" for b in BRANCHES)
        right, cost = accuracy_and_cost_gaps(result, results[better])
        told = " | ".join(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" for mean, low, high in (right, cost))
        holds = right[0] >= 0 and right[1] >= -0.05 and cost[2] < 0
        row = f"| {name} | {worth[name][0]:.3f} | {-worth[name][1]:.2f} | {shares} | {told} |"
        yield row + (" holds |" if holds and name not in ("oracle", better) else " |")


def read_rows(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, with a trained scorer's rewards where there are some; and the names of the rewards."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    if not (folder / "scorer.jsonl").exists():
        return rows, ["self"]
    _, *told = [json.loads(line) for line in (folder / "scorer.jsonl").read_text().splitlines()]
    for row, more in zip(rows, told, strict=True):
        row["scorer"] = more["scorer"]
        row["cost"] |= {f"scorer {branch}": seconds for branch, seconds in more["cost"].items()}
    return rows, ["self", "scorer"]


def chart(dev: Sequence[Row], test: Sequence[Row], rewards: Sequence[str]) -> str:
    """Accuracy against seconds of all policies, some by name."""
    results = dict(policy_results(dev, test, rewards))
    points = {
        name: Point(0.0, 0.0, statistics.fmean(result.right), statistics.fmean(result.cost), {})
        for name, result in results.items()
    }
    router = next(name for name in points if name.startswith("router") and "the default" in name)
    named = [name for name in points if name.startswith("always")] + ["random, equal shares", router]
    marked = {name.split(", ")[0]: points[name] for name in named}
    return svg_accuracy_chart([point for name, point in points.items() if name != "oracle"], marked, "test questions")


def main(folder: Path, chart_file: Path | None = None) -> None:
    rows, rewards = read_rows(folder)
    dev, test = ([row for row in rows if row["part"] == part] for part in ("dev", "test"))
    if chart_file is not None:
        chart_file.write_text(chart(dev, test, rewards), encoding="utf-8")
    print("\n".join([*by_task(rows, rewards), *table_rows(dev, test, rewards)]))
    for name in dict.fromkeys(row["task"] for row in rows):
        own_dev, own_test = ([row for row in part if row["task"] == name] for part in (dev, test))
        if min(len(own_dev), len(own_test)) >= LEAST:
            print(f"\n{name} alone", *table_rows(own_dev, own_test, rewards), sep="\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
