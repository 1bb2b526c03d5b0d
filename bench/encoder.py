"""Texts a second of an encoder: torch in float32 and bfloat16 against the native engine, taking turns.

    python -m bench.encoder FOLDER [--threads N]

FOLDER is a checkpoint of an encoder without a head, as all-MiniLM-L6-v2. Prints for batches of texts of one length the
median over rounds of texts a second, and the ratio to torch's better one in the same round.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTHS, BATCHES, ROUNDS = (16, 128), (1, 32), 7


def open_native_encoder(model, weights: str, threads: int) -> Any:
    from effc.compiler.ir.capture.capture import capture
    from effc.compiler.runtimes.native.emission import native_artifact_facts
    from effc.compiler.runtimes.native.opening import open_native
    from effc.compiler.runtimes.native.plan_files import write_plan
    from effc.compiler.runtimes.native.reader import Reader

    plan = Reader(capture(model), weights).build_plan()
    with tempfile.TemporaryDirectory() as folder:
        write_plan(plan, Path(folder), native_artifact_facts(model, weights, plan.output))
        return open_native(Path(folder), threads=threads, max_sequences=max(BATCHES))


def median_seconds(forward, ids) -> float:
    started = time.perf_counter()
    forward(ids)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch
    from effc.compiler.core.fingerprint import machine_facts
    from transformers import AutoModel

    torch.set_num_threads(options.threads)
    model = AutoModel.from_pretrained(options.folder).eval()
    half = AutoModel.from_pretrained(options.folder, dtype=torch.bfloat16).eval()
    calls = {
        "torch float32": lambda ids: model(input_ids=ids),
        "torch bfloat16": lambda ids: half(input_ids=ids),
        "native bf16": open_native_encoder(model, "bf16", options.threads),
        "native int8": open_native_encoder(model, "int8", options.threads),
    }
    told = machine_facts()
    print(
        f"{told['cpu']}, torch {told['torch']}, transformers {told['transformers']}; {options.threads} threads; {ROUNDS} rounds, texts of random tokens, seed 0"
    )
    torch.manual_seed(0)
    with torch.inference_mode():
        for batch in BATCHES:
            for length in LENGTHS:
                ids = torch.randint(1000, 20000, (batch, length))
                taken = {name: [] for name in calls}
                for turn in range(ROUNDS + 1):
                    for name, call in calls.items():
                        spent = median_seconds(call, ids)
                        if turn:
                            taken[name].append(spent)
                best = [min(pair) for pair in zip(taken["torch float32"], taken["torch bfloat16"], strict=True)]
                print(f"{batch} texts of {length} tokens")
                for name, each in taken.items():
                    ratio = statistics.median(b / own for b, own in zip(best, each, strict=True))
                    print(f"  {name:15} {batch / statistics.median(each):8.1f} texts/s   {ratio:.2f} of torch's better")


if __name__ == "__main__":
    sys.exit(main())
