"""Print what RaFFM gives thirty or a hundred clients of unlike machines, beside FedAvg and FedAvg without the slow ones.

    python -m bench.many_clients MODEL DATA FOLDER [--clients 30] [--mix even] [--seeds 0 1 2] [--rounds 8] [--steps 4]
                                 [--split even] [--target 0.8] [--megabits 100] [--only ARM...] [--json FILE]

MODEL, DATA   as bench/reviews.py has them: three layers of MiniLM and one that takes the mean, all weights trained
FOLDER        keeps what is done: rows.json has every update of every client; a second start goes on from there
--clients     of whom ten take part in a round, drawn by the seed; 3,200 sentences of SST-2 are dealt to all
--mix         shares of machines of relative speed 1, 1/2, 1/4 and 1/8: "even" 25 % each; "slow" 10, 20, 30 and 40 %.
              The speeds are an assumption: machines of a few generations. The paper's (V100, Jetson Orin, a laptop,
              Raspberry Pi 5 and 4) are further apart, in shares of its own
--megabits    a second of each client's network in both directions, the same for all: an assumption, too; inf for none

The vocabulary is cut to its 3,000 most frequent pieces, so that the table of embeddings, which no sub-network cuts, is
a seventh of the parameters. Time is emulated: a round lasts as long as the slowest of its clients, processor seconds of
one thread (median of all updates of that size in FOLDER) by speed, and bytes by bandwidth. The server takes no time.
Arms, all of as many rounds, steps and clients a round:
FedAvg              the whole model on all
without slow half   FedAvg of the faster half of the clients alone, with their rows alone
RaFFM by speed      budgets of 100, 75, 60 and 50 % of the parameters, the slower the smaller, counted among all clients
by holders          the same, counted among those who hold an entry
Accuracy is on 300 test sentences (standard error 0.02), "at the end" the mean of the last three rounds. "Of FedAvg's" are
geometric means of the seeds' ratios, bytes or seconds up to the first round that reaches the target; "beside FedAvg" the
mean of the seeds' differences: both paired by seed, with a 95 % interval by Student's t where there are several.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from effc.compiler.apps.federation.declaration import Declaration
from effc.compiler.core.fingerprint import machine_facts

from bench.json_table import add_json_option, write_table
from bench.paired import mean_and_half_width
from bench.raffm import COVER, DEALS, Look, Update, run_federation, write_seed_rows
from bench.reviews import Arm, compile_federation
from bench.row_store import RowStore
from bench.tables import markdown

SPEEDS, BUDGETS = (1.0, 1 / 2, 1 / 4, 1 / 8), (100, 75, 60, 50)  # percent of the parameters, the whole first
MIXES = {"even": (0, 1, 2, 3), "slow": (0, 1, 1, 2, 2, 2, 3, 3, 3, 3)}  # classes of clients, repeated
PER_ROUND, ROWS, PIECES, LAST = 10, 3200, 3000, 3
WHOLE: dict[str, Any] = {"strategy": "fedavg", "sizes": (), "size_of": ()}


@dataclass(frozen=True)
class Method:
    """Changes of the declaration of a federation with budgets.

    is_fast_only   the faster half of the clients takes part
    reads_mix      what is trained depends on whose machine is which
    """

    changes: dict[str, Any] = field(default_factory=dict)
    is_fast_only: bool = False
    reads_mix: bool = True


BASELINE = "FedAvg"
METHODS = {
    BASELINE: Method(WHOLE, reads_mix=False),
    "without slow half": Method(WHOLE, is_fast_only=True),
    "RaFFM by speed": Method({"counted": "all"}),
    "by holders": Method({"counted": "holders"}),
}


def machine_classes(clients: int, mix: str) -> list[int]:
    """Index in SPEEDS of every client's machine."""
    return [MIXES[mix][client % len(MIXES[mix])] for client in range(clients)]


def measured_row(app: tuple[Path, Declaration], data: Path, seed: int, method: Method, mix: str) -> dict[str, Any]:
    path, declared = app
    classes = machine_classes(declared.clients, mix)
    size_of = tuple(classes if method.reads_mix else [0] * len(classes))
    declared = declared.with_changes(**{"size_of": size_of, "budgets": (), "examples": 0} | method.changes)
    fastest = sorted(sorted(range(len(classes)), key=lambda client: classes[client])[: len(classes) // 2])
    looks = run_federation((path, declared), data, seed, fastest if method.is_fast_only else ())
    return {"looks": [[look.accuracy, [list(astuple(update)) for update in look.updates]] for look in looks]}


@dataclass(frozen=True)
class Course:
    """A run by round: accuracy, bytes of all clients, emulated seconds."""

    accuracy: list[float]
    bytes: list[int]
    seconds: list[float]

    @property
    def last_accuracy(self) -> float:
        return statistics.fmean(self.accuracy[-LAST:])

    def rounds_to(self, target: float) -> int | None:
        return next((n for n, accuracy in enumerate(self.accuracy, 1) if accuracy >= target), None)

    def bytes_to(self, target: float) -> float:
        return sum(self.bytes[: self.rounds_to(target)]) if self.rounds_to(target) else math.nan

    def seconds_to(self, target: float) -> float:
        return sum(self.seconds[: self.rounds_to(target)]) if self.rounds_to(target) else math.nan


def looks_of(row: dict[str, Any]) -> list[Look]:
    return [Look(accuracy, tuple(Update(*update) for update in updates)) for accuracy, updates in row["looks"]]


def median_seconds(rows: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Processor seconds of an update by the bytes of its state."""
    updates = [update for row in rows for look in looks_of(row) for update in look.updates]
    return {size: statistics.median(u.seconds for u in updates if u.down == size) for size in {u.down for u in updates}}


def emulated_course(row: dict[str, Any], mix: str, seconds: dict[int, float], bytes_per_second: float) -> Course:
    looks, classes = looks_of(row), machine_classes(row["clients"], mix)
    lengths = [
        max(seconds[u.down] / SPEEDS[classes[u.client]] + (u.down + u.up) / bytes_per_second for u in look.updates)
        for look in looks
    ]
    return Course([look.accuracy for look in looks], [look.bytes for look in looks], lengths)


def ratio_text(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Geometric mean of paired ratios with its interval, "" where the target was missed."""
    if any(map(math.isnan, (*values, *baseline))):
        return ""
    mean, error = mean_and_half_width([math.log(value / base) for value, base in zip(values, baseline, strict=True)])
    if math.isinf(error):
        return f"{math.exp(mean):.2f}"
    return f"{math.exp(mean):.2f} ({math.exp(mean - error):.2f} .. {math.exp(mean + error):.2f})"


def difference_text(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Mean of paired differences with its interval."""
    mean, error = mean_and_half_width([value - base for value, base in zip(values, baseline, strict=True)])
    return f"{mean:+.3f}" if math.isinf(error) else f"{mean:+.3f} ± {error:.3f}"


def table_lines(store: RowStore, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A line for each arm of each number of clients and mix behind the heads."""
    head = ("clients, machines, split", "arm", "seeds", "MiB a round", "s a round", "rounds to the target")
    lines = [(*head, "MiB, of FedAvg's", "s, of FedAvg's", "accuracy at the end", "beside FedAvg")]
    seconds, speed = median_seconds(store.rows), options.megabits * 1e6 / 8
    settings = {(r["clients"], m, r["split"]) for r in store.rows for m in MIXES if r["mix"] == m}
    for clients, mix, split in sorted(settings, key=lambda s: (s[0], s[2], s[1])):
        rows = [r for r in store.rows if (r["clients"], r["split"]) == (clients, split) and r["mix"] in ("", mix)]
        courses: dict[str, dict[int, Course]] = {arm: {} for arm in METHODS}
        for row in rows:
            courses[row["arm"]][row["seed"]] = emulated_course(row, mix, seconds, speed)
        for arm in (arm for arm in METHODS if courses[arm]):
            cells = arm_cells(courses[arm], courses[BASELINE], options.target)
            lines.append((f"{clients}, {mix}, {split}", arm, *cells))
    return lines


def arm_cells(by_seed: dict[int, Course], baseline: dict[int, Course], target: float) -> list[str]:
    """Cells of an arm over the seeds that the baseline has, too."""
    seeds = sorted(by_seed.keys() & baseline.keys())
    arm, base = [by_seed[seed] for seed in seeds], [baseline[seed] for seed in seeds]
    cells = [str(len(seeds)), f"{statistics.fmean(b for c in arm for b in c.bytes) / 2**20:.0f}"]
    cells.append(f"{statistics.fmean(s for c in arm for s in c.seconds):.1f}")
    cells.append(", ".join(str(course.rounds_to(target) or "none") for course in arm))
    last = [c.last_accuracy for c in arm], [c.last_accuracy for c in base]
    accuracy = f"{statistics.fmean(last[0]):.3f}"
    if by_seed is baseline:
        return [*cells, "", "", accuracy, ""]
    cells.append(ratio_text([c.bytes_to(target) for c in arm], [c.bytes_to(target) for c in base]))
    cells.append(ratio_text([c.seconds_to(target) for c in arm], [c.seconds_to(target) for c in base]))
    return [*cells, accuracy, difference_text(*last)]


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "folder"):
        parser.add_argument(name, type=Path)
    for name, value in (("clients", 30), ("rounds", 8), ("steps", 4), ("layers", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mix", choices=MIXES, default="even")
    parser.add_argument("--split", choices=DEALS, default="even")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    for name, value in (("rate", 2e-4), ("target", 0.8), ("megabits", 100.0)):
        parser.add_argument(f"--{name}", type=float, default=value)
    add_json_option(parser)
    return parser.parse_args()


def compiled_app(options: argparse.Namespace, folder: Path) -> tuple[Path, Declaration]:
    """The artifact of a federation with budgets, and its declaration with the whole model as size 0."""
    budgets = ", ".join(f"{BUDGETS[k]}%" for k in machine_classes(options.clients, "even"))
    settings = f"clients: {options.clients}, share: {100 * PER_ROUND / options.clients:.4f}%, {DEALS[options.split]}"
    settings += f", hold: 0%, rounds: {options.rounds}, steps: {options.steps}, lr: {options.rate:g}"
    arm = Arm("", f"{COVER}, budgets: [{budgets}]", ())
    path, declared = compile_federation(folder, arm, ["class0", "class1"], "app", settings, options.seeds[0])
    assert len(declared.sizes) == len(BUDGETS) and not declared.sizes[0].cuts, "sizes are not the four budgets'"
    return path, declared


def main() -> None:
    options = parsed_options()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    began, folder = time.monotonic(), options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    setting = {name: getattr(options, name) for name in ("rounds", "steps", "layers", "rate")}
    store = RowStore(folder / "rows.json", setting)
    keys = [
        (seed, arm, options.mix if METHODS[arm].reads_mix else "") for seed in options.seeds for arm in options.only
    ]
    measured = {(r["clients"], r["split"], r["seed"], r["arm"], r["mix"]) for r in store.rows}
    missing = [key for key in keys if (options.clients, options.split, *key) not in measured]
    if missing:
        data = write_seed_rows(options, folder, options.seeds, ROWS, PIECES)
        app = compiled_app(options, folder)
        print(f"sizes: {[f'{size.params:,}' for size in app[1].sizes]}, {time.monotonic() - began:.0f} s", flush=True)
    for seed, arm, mix in missing:
        row = {"clients": options.clients, "split": options.split, "seed": seed, "arm": arm, "mix": mix}
        store.add(row | measured_row(app, data[seed], seed, METHODS[arm], options.mix))
        accuracies = " ".join(f"{look.accuracy:.2f}" for look in looks_of(store.rows[-1]))
        print(f"seed {seed}, {arm}: {accuracies}; {time.monotonic() - began:.0f} s", flush=True)
    columns, *lines = table_lines(store, options)
    print(markdown([columns, *lines]))
    write_table(options.json, columns, lines)


if __name__ == "__main__":
    main()
