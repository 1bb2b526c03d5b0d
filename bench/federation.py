"""Print what strategies of a federation come to for their bytes, and what the server's part costs with many clients.

    python -m bench.federation                                 4 clients on the embedded tiny-llama
    python -m bench.federation --scale                         the server alone, 100 to 10,000 clients

Four clients learn to tell speech from deeds in verses of the embedded model's own text, dealt to them by a Dirichlet
distribution (beta 0.5) by whether they are the one or the other: client and task differ. All have the same steps of the
same rows. `loss` is nats per token of the answers in rows that a client keeps back, the mean of the clients and that of
the worst; bytes are those of the arrays.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from effc.compiler.apps.federation.strategy import TrainedState

ZOO = Path(__file__).parents[1] / "recipes/zoo/tiny-llama"
RECIPE = """effspec 1
model base = zoo("tiny-llama")
data deeds = pairs("deed.jsonl", join: " ", length: 64)
data speech = pairs("speech.jsonl", join: " ", length: 64)
pipeline p(base) {{ {steps} }}
emit p {{ flower("fed", data: [deeds, speech], clients: 4, rounds: {rounds}, steps: {local}, batch: 8, split: dirichlet,
  hold: 25%, {more}) }}
"""
EDITS = 'edits = reft.insert(positions: "f3+l3", rank: 4)'
LORA = 'on: "*.{q,v}_proj", rank: 4, alpha: 8, lr: 5e-3'
ARMS = {
    "FedReFT, mean, align": (EDITS, "trains: reft, strategy: abm, lr: 5e-3"),
    "FedReFT, mean, function": (EDITS, "trains: reft, strategy: abm, way: function, lr: 5e-3"),
    "FedReFT, median, align": (EDITS, "trains: reft, strategy: abm, center: median, lr: 5e-3"),
    "LoReFT, FedAvg": (EDITS, "trains: reft, strategy: fedavg, lr: 5e-3"),
    "LoReFT, alone": (EDITS, "trains: reft, strategy: alone, lr: 5e-3"),
    "FedIT": ("", f"strategy: fedavg, {LORA}"),
    "FFA-LoRA": ("", f"strategy: ffa, {LORA}"),
    "stacking": ("", f"strategy: stack, {LORA}"),
    "LoRA, alone": ("", f"strategy: alone, {LORA}"),
}


WAYS = (("mean", "project"), ("mean", "align"), ("median", "align"))


def run_rounds(folder: Path, arm: str, seed: int, rounds: int, local_steps: int) -> Any:
    """The rounds of one arm."""
    from effc.compiler.apps.federation.app import PACKAGE
    from effc.compiler.apps.federation.declaration import read_declaration
    from effc.compiler.apps.federation.simulation import simulate_federation
    from effc.compiler.core.settings import Settings
    from effc.compiler.driver import api

    steps, more = ARMS[arm]
    recipe = folder / "r.effspec"
    recipe.write_text(RECIPE.format(steps=steps, more=more, rounds=rounds, local=local_steps))
    out = folder / f"{seed}-{list(ARMS).index(arm)}"
    (made,) = api.compile(recipe, out=out, cache_dir=folder / "cache", seed=seed, threads=1, force=True)
    path = made.artifacts[0].path
    declared = read_declaration(path / PACKAGE / "federation.json")
    return simulate_federation(declared, path / declared.folder, folder, Settings(folder / "cache", seed=seed)).course


def compare_methods(seeds: list[int], rounds: int, local_steps: int, methods: list[str]) -> None:
    print(f"4 clients, {rounds} rounds of {local_steps} steps of 8 rows, seeds {seeds}")
    print(
        "| arm | loss | worst client | KiB up a round | KiB down a round | seconds a round |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = [json.loads(line) for line in (ZOO / "speech-train.jsonl").read_text().splitlines()]
        for name in ("deed", "speech"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r["answer"] == name))
        for arm in methods:
            found = [run_rounds(folder, arm, seed, rounds, local_steps) for seed in seeds]
            last = [c.rounds[-1] for c in found]
            values = (_spread([r.loss for r in last]), _spread([r.worst for r in last]))
            sizes = [
                f"{statistics.mean(x) / 1024:.1f}" for x in ([r.bytes_up for r in last], [r.bytes_down for r in last])
            ]
            spent = statistics.mean(r.seconds for c in found for r in c.rounds)
            print(f"| {arm} | {values[0]} | {values[1]} | {sizes[0]} | {sizes[1]} | {spent:.1f} |", flush=True)


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f}" + (f" ({min(values):.3f} .. {max(values):.3f})" if len(values) > 1 else "")


def time_server_rounds(client_counts: list[int]) -> None:
    """A round of the server: putting together what clients sent, and the next payload of each."""
    from effc.compiler.apps.federation.averaging import FedAvg
    from effc.compiler.apps.federation.personal import AllButMe

    full = {f"l{n}.R": (4, 128) for n in range(4)} | {f"l{n}.W": (4, 128) for n in range(4)}
    full |= {f"l{n}.b": (4,) for n in range(4)}
    print("the server's part of a round of interventions of 4,112 numbers, processor seconds")
    print(
        "| clients | FedAvg | mean, project | mean, align | median, align | peak memory, MiB |\n|---|---|---|---|---|---|"
    )
    for count in client_counts:
        sent = _random_states(full, count)
        times = []
        for strategy in (FedAvg(full), *(AllButMe(full, *how, 0.5) for how in WAYS)):
            strategy.begin(sent[0].state)
            started = time.process_time()
            strategy.aggregate(1, sent)
            for k in sent:
                strategy.payload(k, 2, 1)
            times.append(f"{time.process_time() - started:.2f}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"| {count:,} | {' | '.join(times)} | {peak:.0f} |", flush=True)


def _random_states(full_shapes, n_clients: int) -> dict[int, "TrainedState"]:
    """Interventions with orthonormal R, near a common start as those of clients are."""
    from effc.compiler.apps.federation.rotations import with_orthonormal_rotations
    from effc.compiler.apps.federation.strategy import TrainedState

    draw = np.random.default_rng(0)
    start = {n: draw.standard_normal(s) for n, s in full_shapes.items()}
    near = lambda: {n: (a + 0.3 * draw.standard_normal(a.shape)).astype(np.float32) for n, a in start.items()}  # noqa: E731
    return {k: TrainedState(with_orthonormal_rotations(near()), 10) for k in range(n_clients)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--counts", default="100,1000,10000")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local", type=int, default=8)
    parser.add_argument("--arms", help="Part of their names.", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.scale:
        return time_server_rounds([int(n) for n in args.counts.split(",")])
    arms = [arm for arm in ARMS if args.arms in arm]
    return compare_methods([int(s) for s in args.seeds.split(",")], args.rounds, args.local, arms)


if __name__ == "__main__":
    main()
