"""Adapters on the native engine: tokens a second of a batch in which each sequence has one of its own.

    python -m bench.adapters NATIVE [--peft MODEL] [--rank 16] [--count 8] [--threads 2] [--rounds 7] [--json FILE]

NATIVE is a folder that the target `native` wrote. LoRA of random numbers stands behind every linear layer of all blocks;
speed does not depend on the numbers. Contenders take turns, each for one call after one that is not timed, and medians of
rounds are printed. `one by one` are calls of one sequence each. With --peft, the model's folder: the same mixed batch by
peft's `adapter_names`, bfloat16, a cache of 64 tokens, torch's threads the same.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from effc.compiler.runtimes.native.adapters import Factors, low_rank_updates_of_linears
from effc.compiler.runtimes.native.opening import open_native
from effc.kernels.engine import Engine

CONTEXT, PROMPT = 64, 512


def random_lora(engine_plan: dict[str, Any], rank: int, seed: int) -> dict[str, Factors]:
    """Factors of every linear layer but the head."""
    draws, widths, factors = torch.Generator().manual_seed(seed), engine_plan["registers"], {}
    for step in engine_plan["steps"]:
        if step["op"] == "linear" and step["to"] != engine_plan["logits"]:
            n, k = widths[step["to"]], widths[step["x"]]
            down, up = torch.randn(rank, k, generator=draws) * k**-0.5, torch.randn(n, rank, generator=draws) * 0.01
            factors[step["weight"].removesuffix(".weight")] = Factors(down, up)
    return factors


def median_seconds(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, all of them in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def engine_calls(folder: Path, rank: int, n_sequences: int, threads: int) -> dict[str, Callable[[], None]]:
    model = open_native(folder, threads=threads, max_sequences=n_sequences + 1, batch_invariant=True)
    engine, start = model.engine, time.perf_counter()
    assert isinstance(engine, Engine)
    numbers = [
        engine.add_adapter(low_rank_updates_of_linears(model.plan, random_lora(model.plan, rank, seed)))
        for seed in range(n_sequences)
    ]
    print(
        f"{n_sequences} adapters of rank {rank}: {(time.perf_counter() - start) / n_sequences:.3f} s each to draw and to add"
    )
    every = list(range(n_sequences))
    for sequence in every:
        engine.run([7] * CONTEXT, [sequence] * CONTEXT, [])

    def step(sequences: list[int], adapters: list[int] | None) -> None:
        engine.run([7] * len(sequences), sequences, None, adapters)
        for sequence in sequences:
            engine.forget(sequence, CONTEXT)

    def apart() -> None:
        for sequence in every:
            step([sequence], [numbers[sequence]])

    def prompt(adapters: list[int] | None) -> None:
        engine.run([7] * PROMPT, [n_sequences] * PROMPT, [PROMPT - 1], adapters)
        engine.forget(n_sequences)

    return {
        "1 sequence, no adapter": lambda: step([0], None),
        "1 sequence, an adapter": lambda: step([0], [numbers[0]]),
        f"{n_sequences} sequences, no adapter": lambda: step(every, None),
        f"{n_sequences} sequences, one adapter for all": lambda: step(every, [numbers[0]] * n_sequences),
        f"{n_sequences} sequences, each its own": lambda: step(every, numbers),
        f"{n_sequences} sequences, each its own, one by one": apart,
        f"prompt of {PROMPT}, no adapter": lambda: prompt(None),
        f"prompt of {PROMPT}, an adapter": lambda: prompt([numbers[0]] * PROMPT),
    }


def peft_calls(folder: Path, rank: int, n_sequences: int, threads: int) -> dict[str, Callable[[], None]]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    torch.set_num_threads(threads)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="a0")
    for number in range(1, n_sequences):
        model.add_adapter(f"a{number}", config)
    model.eval()
    cache, names = DynamicCache(config=base.config), [f"a{number}" for number in range(n_sequences)]
    with torch.inference_mode():
        model(torch.full((n_sequences, CONTEXT), 7), past_key_values=cache, use_cache=True, adapter_names=names)

    @torch.inference_mode()
    def step() -> None:
        model(torch.full((n_sequences, 1), 7), past_key_values=cache, use_cache=True, adapter_names=names)
        cache.crop(-1)

    return {f"peft, {n_sequences} sequences, each its own": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("native", type=Path)
    parser.add_argument("--peft", type=Path)
    for name, value in (("rank", 16), ("count", 8), ("threads", 2), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = (options.rank, options.count, options.threads)
    calls = engine_calls(options.native, *sizes)
    if options.peft:
        calls |= peft_calls(options.peft, *sizes)
    seconds = median_seconds(calls, options.rounds)
    for name, value in seconds.items():
        tokens = PROMPT if name.startswith("prompt") else options.count if f"{options.count} seq" in name else 1
        print(f"{name:48} {1000 * value:8.2f} ms {tokens / value:8.0f} tokens/s")
    if options.json:
        options.json.write_text(
            json.dumps({"rank": options.rank, "threads": options.threads, "seconds": seconds}, indent=1)
        )


if __name__ == "__main__":
    main()
