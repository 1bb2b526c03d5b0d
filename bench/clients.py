"""Print what four clients' accuracy comes to, strategy by strategy, for the bytes that a round sends.

    python -m bench.clients MODEL DATA [--layout mixed|distinct|outlier] [--clients 4] [--seeds 0,1] [--rounds 4]
                                  [--looks 2] [--arms TEXT,TEXT] [--layers 3] [--json FILE]

MODEL and DATA as bench/reviews.py has them, of the model as many layers as asked. Layouts: `mixed` deals 1,600
sentences of SST-2 to the clients by a Dirichlet distribution (beta 0.5) over the two classes; `distinct` gives each of
four clients a task of its own (SST-2, BoolQ, whose question is it: ARC-Easy's or OpenBookQA's, who wrote the solution
of a sum) of 400 rows, each of eight clients half a task; `outlier` deals SST-2 out evenly to six clients, of whom one
has every label turned, and tells the accuracy of the other five. Every arm makes the same steps of the same rows, 4% of
which a client keeps back. Accuracy is of 200 test rows of each client's task, with the state that the client ends with:
a share of 0.8 has a standard error of 0.03, the same rows for every arm; `--looks` names rounds after which it is told
as well, for accuracy against bytes (bench/curve.py draws what `--json` writes). Bytes are those of the protocol
buffers that Flower would put on the wire, in the last round.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from effc.compiler.apps.federation.declaration import DataSet, Declaration

from bench.reviews import (
    TASKS,
    Arm,
    compile_federation,
    intervention_steps,
    lora,
    sample_rows,
    write_rows,
    write_untrained_classifier,
)
from bench.wire import protobuf_bytes

if TYPE_CHECKING:
    from effc.compiler.apps.federation.rows import Rows

TESTS = 200
REFT = Arm(intervention_steps(1), "trains: reft, strategy: abm, lr: 1e-2", ())
REFT4 = Arm(intervention_steps(4), "trains: reft, strategy: abm, lr: 2e-3", ())
LORA = {rank: Arm("", f"{lora(rank)}, lr: {rate}", ()) for rank, rate in ((1, 1e-2), (8, 2e-3))}
ARMS = {  # what is compiled, and what an arm changes in its declaration
    "FedReFT, mean, align": (REFT, {}),
    "FedReFT, mean, project": (REFT, {"way": "project"}),
    "FedReFT, mean, function": (REFT, {"way": "function"}),
    "FedReFT, median, align": (REFT, {"center": "median"}),
    "FedReFT, mean, adaptive": (REFT, {"mix": None}),
    "FedReFT, rank 4, mean, align": (REFT4, {}),
    "LoReFT, FedAvg": (REFT, {"strategy": "fedavg"}),
    "LoReFT, alone": (REFT, {"strategy": "alone"}),
    "FedIT, rank 1": (LORA[1], {}),
    "FedIT": (LORA[8], {}),
    "FFA-LoRA": (LORA[8], {"strategy": "ffa"}),
    "stacking": (LORA[8], {"strategy": "stack"}),
    "LoRA, alone": (LORA[8], {"strategy": "alone"}),
}
OUTLIER = (
    "FedReFT, mean, align",
    "FedReFT, median, align",
    "LoReFT, FedAvg",
    "LoReFT, alone",
    "FedIT, rank 1",
    "FedIT",
)


def write_client_rows(
    task_name: str, clients: int, data_folder: Path, folder: Path, seed: int, tokenizer
) -> tuple[list[str], str, list[str]]:
    """Write rows; names of the data sets, what `flower` is told of them, and the test file of every client."""
    if task_name == "distinct":
        names, tests, each = [], [], clients // len(TASKS)
        for task, read in TASKS.items():
            rows = sample_rows(read(data_folder, "train"), 400, seed, tokenizer)
            write_rows(sample_rows(read(data_folder, "test"), TESTS, 0, tokenizer), folder / f"{task}-test.jsonl")
            for k in range(each):
                names.append(f"{task}{k}")
                tests.append(f"{task}-test")
                write_rows(rows[k::each], folder / f"{task}{k}.jsonl")
        return names, f"clients: {clients}, split: distinct", tests
    rows = sample_rows(TASKS["sst2"](data_folder, "train"), 1600, seed, tokenizer)
    write_rows(sample_rows(TASKS["sst2"](data_folder, "test"), TESTS, 0, tokenizer), folder / "test.jsonl")
    if task_name == "mixed":
        for label in "01":
            write_rows([row for row in rows if row["label"] == label], folder / f"class{label}.jsonl")
        return ["class0", "class1"], f"clients: {clients}, split: dirichlet, beta: 0.5", ["test"] * clients
    parts = [rows[k * 260 : (k + 1) * 260] for k in range(6)]
    parts[5] = [{**row, "label": str(1 - int(row["label"]))} for row in parts[5]]
    for k, part in enumerate(parts):
        write_rows(part, folder / f"client{k}.jsonl")
    return [f"client{k}" for k in range(6)], "clients: 6, split: distinct", ["test"] * 5


class Scale:
    """A grid that knows the bytes of what goes through it, as Flower would write it."""

    def __init__(self, grid):
        self.grid, self.up, self.down = grid, {}, {}

    def get_node_ids(self) -> Iterable[int]:
        return self.grid.get_node_ids()

    def push_messages(self, messages) -> Iterable[str]:
        messages = list(messages)
        for m in messages:
            self.down[m.number] = self.down.get(m.number, 0) + protobuf_bytes(m.arrays, m.config)
        self.number = max((m.number for m in messages), default=0)
        return self.grid.push_messages(messages)

    def pull_messages(self, ids) -> list:
        replies = self.grid.pull_messages(ids)
        for r in replies:
            self.up[self.number] = self.up.get(self.number, 0) + protobuf_bytes(r.arrays, r.config)
        return replies


@dataclass(frozen=True)
class Run:
    """Accuracy of every client after rounds, by round; bytes of the last round; processor seconds of a round."""

    looks: dict[int, list[float]]
    up: int
    down: int
    seconds: float

    @property
    def last(self) -> list[float]:
        return self.looks[max(self.looks)]


def run_federation(
    compiled_federation: tuple[Path, Declaration],
    data: Path,
    test_files: list[str],
    seed: int,
    evaluated_rounds: set[int],
) -> Run:
    from effc.compiler.apps.federation.client_host import ClientHost
    from effc.compiler.apps.federation.declaration import make_strategy
    from effc.compiler.apps.federation.grid import LocalGrid
    from effc.compiler.apps.federation.rounds import Federation
    from effc.compiler.core.settings import Settings

    path, declared = compiled_federation[0], compiled_federation[1].with_changes(seed=seed)
    place = ClientHost(declared, path / declared.folder, data, Settings(data / "cache", seed=seed, threads=1))
    with place.participants(list(range(declared.clients))) as seats:
        scale = Scale(LocalGrid(seats))
        run = Federation(scale, make_strategy(declared), declared.make_round_terms())
        found: dict[int, list[float]] = {}
        aside = 0.0  # processor seconds of looking

        def look(round_) -> None:
            nonlocal aside
            if round_.number in evaluated_rounds | {declared.rounds}:
                began, learns = time.process_time(), seats[0].learner.held_out
                found[round_.number] = test_accuracies(place, seats[0].learner, run.strategy.results(), test_files)
                seats[0].learner.held_out = learns
                aside += time.process_time() - began

        run.on_round = look
        began = time.process_time()
        run.run()
        spent = (time.process_time() - began - aside) / declared.rounds
    last = declared.rounds
    return Run(found, scale.up[last], scale.down[last], spent)


def test_accuracies(client_host, learner, states, test_files: list[str]) -> list[float]:
    """Accuracy of every client on its test file; of a state that all have, once for each file."""
    first, found, seen = client_host.declared.data[0].name, [], {}
    for client, test in enumerate(test_files):
        name = "global" if "global" in states else f"client-{client}"
        if (name, test) not in seen:
            learner.held_out = read_test_rows(client_host, client_host.data, first, test)
            seen[name, test] = learner.evaluate(states[name], {}).accuracy
        found.append(seen[name, test])
    return found


def read_test_rows(client_host, folder: Path, name: str, test_file: str) -> "Rows":
    """Rows of another file, read as the declared ones are."""
    data = client_host.declared.data[0]
    body = json.loads(json.dumps(dict(data.args)).replace(f"{name}.jsonl", f"{test_file}.jsonl"))
    return read_rows(client_host, folder, replace(data, args=body))


def read_rows(client_host, folder: Path, data: DataSet) -> "Rows":
    """Rows of a data set that the federation does not declare."""
    from effc.compiler.apps.federation.client_host import ClientHost

    other = client_host.declared.with_changes(data=(data,))
    (rows,) = ClientHost(other, client_host.model, folder, client_host.settings)._load_rows_by_source()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--layout", default="mixed", choices=("mixed", "distinct", "outlier"))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clients", type=int, default=4, choices=(4, 8))
    parser.add_argument("--looks", help="Rounds after which to judge.", default="")
    parser.add_argument("--arms", help="Their names, or parts of them, with semicolons between.", default="")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--json", type=Path, help="Where to write all numbers.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    wanted = args.arms.split(";")
    arms = [arm for arm in (OUTLIER if args.layout == "outlier" else ARMS) if any(part in arm for part in wanted)]
    looks = {int(n) for n in args.looks.split(",") if n}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        from effc.compiler.models.checkpoints.model_folder import load_tokenizer

        write_untrained_classifier(args.model, folder / "classifier", args.data, args.layers)
        tokenizer = load_tokenizer(folder / "classifier", "the model", False)
        places = {seed: folder / f"seed-{seed}" if n else folder for n, seed in enumerate(seeds)}
        for seed, place in places.items():
            place.mkdir(exist_ok=True)
            names, told, tests = write_client_rows(args.layout, args.clients, args.data, place, seed, tokenizer)
        settings = f"{told}, rounds: {args.rounds}, steps: {args.steps}, hold: 4%"
        print(f"{told}; {args.layers} layers, {args.rounds} rounds of {args.steps} steps of 8, seeds {seeds}")
        print("| arm | accuracy | worst client | by client | KiB up | KiB down | CPU s a round |")
        print("|---|---|---|---|---|---|---|", flush=True)
        apps, all_runs = {}, {}
        for arm in arms:
            told, changes = ARMS[arm]
            if told not in apps:
                apps[told] = compile_federation(folder, told, names, f"app-{len(apps)}", settings, seeds[0])
            path, declared = apps[told]
            app = path, declared.with_changes(**changes)
            runs = [run_federation(app, place, tests, seed, looks) for seed, place in places.items()]
            print(_table_row(arm, runs), flush=True)
            all_runs[arm] = [asdict(run) for run in runs]
            if args.json:
                args.json.write_text(json.dumps({"layout": args.layout, "clients": args.clients, "arms": all_runs}))


def _table_row(arm: str, runs: list[Run]) -> str:
    means, worst = [statistics.mean(r.last) for r in runs], [min(r.last) for r in runs]
    each = " ".join(f"{statistics.mean(values):.2f}" for values in zip(*(r.last for r in runs), strict=True))
    up, down, spent = (statistics.mean(getattr(r, part) for r in runs) for part in ("up", "down", "seconds"))
    return (
        f"| {arm} | {_spread(means)} | {_spread(worst)} | {each} | {up / 1024:.1f} | {down / 1024:.1f} | {spent:.1f} |"
    )


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


if __name__ == "__main__":
    main()
