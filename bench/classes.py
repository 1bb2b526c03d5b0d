"""Print accuracy against trained parameters on SST-2: interventions, adapters, the head alone and all weights.

    python -m bench.classes MODEL DATA [--seconds 40] [--rows 800] [--seeds 0,1,2] [--layers 3]

MODEL and DATA as bench/reviews.py has them, of the model as many layers as asked. Every method has the same
processor time to train, on one thread: three steps say how many fit in. All see the same 4,000 sentences of at most 24
tokens in an order that the seed decides, AdamW at a constant rate; of two rates each takes the one that is better after
half its steps, with a seed of its own, on 200 sentences of the training file that nothing learns from. Test rows are of
the test file. The head is trained along by every method.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.reviews import (
    Arm,
    compile_federation,
    intervention_steps,
    lora,
    sample_rows,
    sst2,
    write_rows,
    write_untrained_classifier,
)

if TYPE_CHECKING:
    from effc.compiler.apps.federation.client_host import ClientHost

ONE = "clients: 1, rounds: 1, hold: 0%"
ARMS = {
    "head alone": Arm("", f"trains: full, {ONE}", (1e-2, 5e-2)),
    "LoReFT, rank 1": Arm(intervention_steps(1), f"trains: reft, {ONE}", (2e-3, 1e-2)),
    "LoReFT, rank 4": Arm(intervention_steps(4), f"trains: reft, {ONE}", (2e-3, 1e-2)),
    "DiReFT, rank 4": Arm(intervention_steps(4, "direft"), f"trains: reft, {ONE}", (2e-3, 1e-2)),
    "LoRA on q and v, rank 1": Arm("", f"{lora(1)}, {ONE}", (2e-3, 1e-2)),
    "LoRA on q and v, rank 8": Arm("", f"{lora(8)}, {ONE}", (2e-3, 1e-2)),
    "all weights": Arm("", f"trains: full, {ONE}", (5e-5, 2e-4)),
}
KEPT = 200


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--layers", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        from effc.compiler.models.checkpoints.model_folder import load_tokenizer

        write_untrained_classifier(args.model, folder / "classifier", args.data, args.layers)
        tokenizer = load_tokenizer(folder / "classifier", "the model", False)
        train = sample_rows(sst2(args.data, "train"), 4000 + KEPT, 0, tokenizer)
        write_rows(train[KEPT:], folder / "train.jsonl")
        write_rows(train[:KEPT], folder / "kept.jsonl")
        write_rows(sample_rows(sst2(args.data, "test"), args.rows, 0, tokenizer), folder / "test.jsonl")
        seeds = [int(seed) for seed in args.seeds.split(",")]
        print(f"SST-2 on {args.layers} layers of MiniLM, {args.seconds:g} s of processor time to train, seeds {seeds}")
        print("| method | trained parameters | accuracy | lr | steps of 8 | s a step |\n|---|---|---|---|---|---|")
        for number, name in enumerate(ARMS):
            print(_train_arm_and_format_row(folder, name, f"arm-{number}", args.seconds, seeds), flush=True)


def _train_arm_and_format_row(
    folder: Path, arm_name: str, arm_folder_name: str, seconds: float, seeds: list[int]
) -> str:
    """Train an arm with every seed, at the better of its rates."""
    from effc.compiler.apps.federation.client_host import ClientHost
    from effc.compiler.apps.federation.language import CausalLmLearner
    from effc.compiler.core.settings import Settings

    path, declared = compile_federation(folder, ARMS[arm_name], ["train"], arm_folder_name, "", 0)
    host = ClientHost(declared, path / declared.folder, folder, Settings(folder / "cache", threads=1))
    with host.participants([0]) as (participant,):
        learner = participant.learner
        assert isinstance(learner, CausalLmLearner)
        judges = {part: _read_split(host, folder, part) for part in ("kept", "test")}
        start = learner.initial_state(0)
        names = frozenset(n for n in start if not arm_name.startswith("head") or n.startswith("classifier."))
        count = sum(start[n].size for n in names)

        def run(rate: float, steps: int, seed: int, judge: str | None) -> float:
            """Accuracy after training, or the processor seconds of a step."""
            learner.local = replace(learner.local, steps=steps, lr=rate)
            began = time.process_time()
            state = learner.train(start, names, {}, seed, float("inf"))
            if judge is None:
                return (time.process_time() - began) / steps
            learner.held_out = judges[judge]
            return learner.evaluate(state, {})[1]

        each = min(run(1e-3, 3, 99, None) for _ in range(2))
        steps = max(4, round(seconds / each))
        rate = max(ARMS[arm_name].rates, key=lambda r: run(r, max(2, steps // 2), 99, "kept"))
        found = [run(rate, steps, seed, "test") for seed in seeds]
    spread = f"{statistics.mean(found):.3f} ({min(found):.3f} .. {max(found):.3f})"
    return f"| {arm_name} | {count:,} | {spread} | {rate:g} | {steps} | {each:.2f} |"


def _read_split(host: "ClientHost", folder: Path, split: str) -> Any:
    """Rows of another file, read as the declared ones are."""
    from effc.compiler.apps.federation.client_host import ClientHost

    (data,) = host.declared.data
    body = json.loads(json.dumps(data.args).replace("train.jsonl", f"{split}.jsonl"))
    other = host.declared.with_changes(data=(replace(data, args=body),))
    (rows,) = ClientHost(other, host.model, folder, host.settings)._load_rows_by_source()
    return rows


if __name__ == "__main__":
    main()
