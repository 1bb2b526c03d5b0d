"""Print what sub-networks of clients cost and give beside FedAvg of the whole model: RaFFM to a common target.

    python -m bench.raffm MODEL DATA [--target 0.8] [--rounds 4] [--steps 8] [--seeds 0,1] [--layers 6]
                                 [--deal dirichlet|even]

MODEL and DATA as bench/reviews.py has them: all six layers of MiniLM with a head on its first token, or fewer and
one that takes the mean, of whose vocabulary the pieces are kept that the sentences have, since no sub-network is smaller
in words. Four clients have 1,600 sentences of SST-2, dealt by a Dirichlet distribution (beta 0.5) over the two classes
or evenly, and train all weights. After each round the server's model is judged on 300 sentences of the test file (a share of 0.8
has a standard error of 0.02).
Bytes are those of the arrays, up and down, of all clients; seconds are processor time of all clients' training on one
thread, and of the one that took longest. `to the target` counts up to and with the first round that reaches it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.reviews import Arm, compile_federation, sample_rows, sst2, write_rows, write_untrained_classifier

TESTS, KEPT = 300, 2000  # test rows; ids below are special tokens and single letters, and stay
SPECIAL = 104  # ids below are special tokens
DEALS = {"dirichlet": "split: dirichlet, beta: 0.5", "even": "split: even"}
COVER = "trains: full, strategy: coverage"
ARMS = {
    "FedAvg, all of the model": Arm("", "trains: full, strategy: fedavg", ()),
    "RaFFM, 100%, 90%, 90%, 90%": Arm("", f"{COVER}, budgets: [100%, 90%, 90%, 90%]", ()),
    "the same, counted by holders": Arm("", f"{COVER}, budgets: [100%, 90%, 90%, 90%], counted: holders", ()),
    "RaFFM, 100%, 75%, 60%, 50%": Arm("", f"{COVER}, budgets: [100%, 75%, 60%, 50%]", ()),
}


@dataclass(frozen=True)
class Update:
    """Training of a client in a round: bytes of the arrays down and up, processor seconds."""

    client: int
    down: int
    up: int
    seconds: float


@dataclass(frozen=True)
class Look:
    """Accuracy of the server's model after a round, and the round's updates."""

    accuracy: float
    updates: tuple[Update, ...]

    @property
    def bytes(self) -> int:
        return sum(update.down + update.up for update in self.updates)

    @property
    def seconds(self) -> float:
        return sum(update.seconds for update in self.updates)

    @property
    def slowest(self) -> float:
        return max(update.seconds for update in self.updates)


def trim_vocabulary(folder: Path, texts: list[str], most: int = 0) -> int:
    """Leave of a classifier's vocabulary what these texts have; number of pieces left.

    most  pieces, the most frequent ones, that stay beside special tokens; single letters go, too. 0: all, and letters
    """
    from transformers import AutoTokenizer, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = SPECIAL if most else KEPT
    used = Counter(i for text in texts for i in tokenizer(text)["input_ids"] if i >= first)
    kept = [*range(first), *sorted(i for i, _ in used.most_common(most or None))]
    file = folder / "tokenizer.json"
    body = json.loads(file.read_text())
    words = {number: word for word, number in body["model"]["vocab"].items()}
    body["model"]["vocab"] = {words[old]: new for new, old in enumerate(kept)}
    file.write_text(json.dumps(body))
    model = BertForSequenceClassification.from_pretrained(folder)
    table = model.get_input_embeddings()
    table.weight = torch.nn.Parameter(table.weight.detach()[kept].clone())
    table.num_embeddings = model.config.vocab_size = len(kept)
    model.save_pretrained(folder)
    return len(kept)


class Clock:
    """A client whose processor seconds of training are kept by its number."""

    def __init__(self, seat, seconds: dict[int, float]):
        self.seat, self.seconds = seat, seconds

    def __call__(self, message, memory) -> Any:
        began = time.process_time()
        answer = self.seat(message, memory)
        if message.kind == "train":
            self.seconds[self.seat.client] = time.process_time() - began
        return answer


def run_federation(app, data: Path, seed: int, clients: Sequence[int] = ()) -> list[Look]:
    """All rounds; of some clients, as many of them take part in a round as would of all."""
    from effc.compiler.apps.federation.client_host import ClientHost
    from effc.compiler.apps.federation.declaration import make_strategy
    from effc.compiler.apps.federation.grid import LocalGrid
    from effc.compiler.apps.federation.rounds import Federation
    from effc.compiler.core.settings import Settings

    from bench.clients import read_test_rows

    path, declared = app[0], app[1].with_changes(seed=seed)
    host = ClientHost(declared, path / declared.folder, data, Settings(data / "cache", seed=seed, threads=1))
    looks: list[Look] = []
    seconds: dict[int, float] = {}
    clients = clients or range(declared.clients)
    share = declared.share * declared.clients / len(clients)
    terms = replace(declared.make_round_terms(), clients=len(clients), share=share)
    with host.participants(list(clients)) as seats:
        judge = seats[0].learner  # of the whole model
        learns, judge_rows = judge.held_out, read_test_rows(host, data, declared.data[0].name, "test")
        run = Federation(LocalGrid([Clock(s, seconds) for s in seats]), make_strategy(declared), terms)

        def look(round_) -> None:
            judge.held_out = judge_rows
            accuracy = judge.evaluate(run.strategy.results()["global"], {}).accuracy
            judge.held_out = learns
            updates = [Update(k, u.bytes_down, u.bytes_up, seconds[k]) for k, u in sorted(round_.updates.items())]
            looks.append(Look(accuracy, tuple(updates)))

        run.on_round = look
        run.run()
    return looks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rate", default="2e-4")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--deal", choices=DEALS, default="dirichlet")
    parser.add_argument("--arms", help="Part of their names.", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        places = write_seed_rows(args, folder, seeds)
        print(f"{args.rounds} rounds of {args.steps} steps of 8, rate {args.rate}, target {args.target}, seeds {seeds}")
        print("| arm | MiB a round | CPU s a round | of the slowest | accuracy by round |", end="")
        print(" rounds to the target | MiB | CPU s |\n|---|---|---|---|---|---|---|---|", flush=True)
        for number, name in enumerate(name for name in ARMS if args.arms in name):
            told = (
                f"clients: 4, hold: 0%, {DEALS[args.deal]}, rounds: {args.rounds}, steps: {args.steps}, lr: {args.rate}"
            )
            app = compile_federation(folder, ARMS[name], ["class0", "class1"], f"app-{number}", told, seeds[0])
            print(
                _table_row(name, [run_federation(app, place, seed) for seed, place in places.items()], args.target),
                flush=True,
            )


def write_seed_rows(args, folder: Path, seeds: Sequence[int], rows: int = 1600, pieces: int = 0) -> dict[int, Path]:
    """Folder of every seed's sentences; the classifier lies in `folder`, which has the first seed's.

    pieces  most frequent ones of the task's whole vocabulary that the classifier keeps; 0: those of these sentences
    """
    from effc.compiler.models.checkpoints.model_folder import load_tokenizer

    write_untrained_classifier(args.model, folder / "classifier", args.data, args.layers, mean=args.layers < 6)
    tokenizer, train = load_tokenizer(folder / "classifier", "the model", False), sst2(args.data, "train")
    test = sample_rows(sst2(args.data, "test"), TESTS, 0, tokenizer)
    parts = {seed: sample_rows(train, rows, seed, tokenizer) for seed in seeds}
    folders = {seed: folder / f"seed-{seed}" if n else folder for n, seed in enumerate(seeds)}
    for seed, seed_folder in folders.items():
        seed_folder.mkdir(exist_ok=True)
        write_rows(test, seed_folder / "test.jsonl")
        for label in "01":
            write_rows([row for row in parts[seed] if row["label"] == label], seed_folder / f"class{label}.jsonl")
    texts = [row["text"] for part in ((train,) if pieces else (test, *parts.values())) for row in part]
    print(f"MiniLM with {trim_vocabulary(folder / 'classifier', texts, pieces):,} pieces of its vocabulary")
    return folders


def _table_row(name: str, runs: list[list[Look]], target: float) -> str:
    looks = [look for run in runs for look in run]
    each = [f"{statistics.mean(look.bytes for look in looks) / 2**20:.1f}"]
    each += [f"{statistics.mean(getattr(look, part) for look in looks):.1f}" for part in ("seconds", "slowest")]
    each.append("; ".join(" ".join(f"{look.accuracy:.2f}" for look in run) for run in runs))
    until = [next((n for n, look in enumerate(run, 1) if look.accuracy >= target), None) for run in runs]
    each.append(", ".join("none" if n is None else str(n) for n in until))
    for scale, part in ((2**20, "bytes"), (1, "seconds")):
        sums = [
            None if n is None else sum(getattr(look, part) for look in run[:n]) / scale
            for n, run in zip(until, runs, strict=True)
        ]
        each.append(", ".join("-" if value is None else f"{value:.0f}" for value in sums))
    return f"| {name} | {' | '.join(each)} |"


if __name__ == "__main__":
    main()
