"""Print what one step of each kind of a search by prune.multi takes on a large model, and what a whole search adds up to.

    python -m bench.search_steps [SIZE] [--tokens 1024] [--share 0.1] [--threads 1] [--folder FOLDER]

Made for machines that are too slow or too busy for the whole search (`search_large.py`). The checkpoint is random and
made on the spot. Each kind runs once on the model itself by effc's own code; processor seconds count, so that what
else runs on the machine matters little. The sum takes the number of steps by the formulas that are printed beside
it. Of the 8B Llama (hidden 4096, 32 layers, 32/8 heads, MLP 14336) nothing ran: its steps are this model's, scaled by
their operations.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.core.memory import anonymous_memory_bytes
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.rows.forward import evaluating
from effc.compiler.transforms.search.gradients import DRAWS, GradientSweep
from effc.compiler.transforms.search.importance import obs_importance
from effc.compiler.transforms.search.prefix import Prefix
from effc.compiler.transforms.search.reconstruct import Moments, Reconstruction, module_of, readers
from transformers import AutoModelForCausalLM

from bench.search_large import GROUP, SIZES, write_random_checkpoint

OWN_ROWS, OWN_LENGTH = 32, 256
EIGHT = (4096, 32, 32, 8, 14336, 128256)


class GradientSeconds(NamedTuple):
    through_one_layer: float
    behind_last_layer: float


def print_and_get_processor_seconds(label: str, run) -> float:
    started = time.process_time()
    run()
    seconds = time.process_time() - started
    print(f"  {label:60} {seconds:8.2f} processor s, {anonymous_memory_bytes() / 2**30:5.2f} GiB held", flush=True)
    return seconds


def measure_steps(size: str, folder: Path, tokens: int) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder / size, dtype=torch.bfloat16).eval()
    program, vocabulary = capture(model), SIZES[size][-1]
    ids = torch.randint(vocabulary, (tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    last = max(g.site for g in skeleton_of(program).groups if g.kind == "channels")
    group = next(g for g in skeleton_of(program).groups if (g.site, g.kind) == (last, "channels"))
    (member,) = readers(group)
    found: dict[str, float] = {}

    def write() -> None:
        with torch.no_grad():
            model.generate(ids[:1, :1].expand(OWN_ROWS, 1), max_new_tokens=5, min_new_tokens=5, do_sample=False)

    found["write"] = print_and_get_processor_seconds(f"4 more tokens of {OWN_ROWS} rows, written", write) / 4
    with tempfile.TemporaryDirectory() as name:
        moments = Moments(Path(name))

        def read() -> None:
            with evaluating(model):
                model(ids, use_cache=False)

        found["read"] = print_and_get_processor_seconds(f"{tokens} tokens, read", read)
        collect = print_and_get_processor_seconds(
            f"{tokens} tokens, read for moments of one MLP",
            lambda: moments.collect_missing_and_count_passes(program, [module_of(member)], read, 1 << 40),
        )
        found["moments"] = max(0.0, collect - found["read"])
        found["rank"] = print_and_get_processor_seconds(
            "channels of one MLP, ranked", lambda: obs_importance(program, group, moments)
        )
        repair, items = Reconstruction(program, moments), list(range(GROUP[size]))
        found["fit"] = print_and_get_processor_seconds(
            "one cut of channels, refitted", lambda: repair.refitted_or_zeroed_reader_weights(group, (), items)
        )
    found["layer"], found["behind"] = time_layer_and_last_gradients(program, ids)
    return found


def time_layer_and_last_gradients(program, ids: torch.Tensor) -> GradientSeconds:
    prefix = Prefix(program, 4 << 30)

    def run() -> float:
        with evaluating(program.model):
            for rows in ids.split(4):
                program.model(rows, use_cache=False)
        return 0.0

    prefix.measure_from(run)
    sweep, grads = GradientSweep(prefix, 0), []
    behind = print_and_get_processor_seconds(
        "gradients of what the last layer gives",
        lambda: grads.extend(sweep._last_layer_output_gradients_and_token_count()[0]),
    )
    last = len(program.units) - 1
    layer = print_and_get_processor_seconds(
        f"gradients through one layer, {1 + DRAWS} at once",
        lambda: [sweep._backpropagate_through_layer(last, call, grad) for call, grad in enumerate(grads)],
    )
    return GradientSeconds(layer, behind)


def scale_to_8b(seconds_by_step: dict[str, float], size: str) -> dict[str, float]:
    """The steps of an 8B Llama by operations: products of layers, second moments, factors of their width cubed."""
    hidden, _, heads, kv, mlp, _ = SIZES[size]
    wide, _, more_heads, more_kv, more_mlp, _ = EIGHT

    def layer(hidden: int, heads: int, kv: int, mlp: int) -> float:
        return hidden * (2 * hidden + 2 * hidden * kv / heads + 3 * mlp)

    per_layer = layer(wide, more_heads, more_kv, more_mlp) / layer(hidden, heads, kv, mlp)
    whole = per_layer * EIGHT[1] / SIZES[size][1]
    square, cube = (more_mlp / mlp) ** 2, (more_mlp / mlp) ** 3
    by = {"write": whole, "read": whole, "moments": square, "rank": cube, "fit": cube, "layer": per_layer}
    return {name: seconds * by.get(name, whole) for name, seconds in seconds_by_step.items()}


def total_seconds(
    seconds_by_step: dict[str, float], layers: int, tokens: int, cuts: int, cuts_per_round: int
) -> dict[str, float]:
    """Processor seconds of a whole search with `estimate: taylor`, by what they are spent on."""
    own, half = OWN_ROWS * OWN_LENGTH / tokens, (layers + 1) / (2 * layers)
    first = 4 * layers / 6
    return {
        "rows of its own": OWN_LENGTH * seconds_by_step["write"],
        "their moments": own * (seconds_by_step["read"] + layers * seconds_by_step["moments"]),
        "ranking": layers * seconds_by_step["rank"],
        "sweep": seconds_by_step["behind"] + layers * seconds_by_step["layer"] + seconds_by_step["read"] * (1 + 4),
        "first round": first * half * seconds_by_step["read"],
        "later rounds": math.ceil(cuts / cuts_per_round) * 3 * half * seconds_by_step["read"],
        "refits": (layers + cuts) * seconds_by_step["fit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", choices=SIZES, default="1b")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--cuts", type=int, default=34)
    parser.add_argument("--together", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/large"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), f"{options.threads} threads", sep=", ")
    write_random_checkpoint(options.folder / options.size, options.size)
    found = measure_steps(options.size, options.folder, options.tokens)
    print("\nwrite x 256; moments: 8192 tokens; ranking: every MLP; sweep: head, every layer, 4L candidates in their")
    print("layers; first round: a sixth of 4L candidates from the middle; later: 3 scores a round; a refit a cut:")
    cases = (
        (options.size, found, SIZES[options.size][1]),
        ("8B, by operations", scale_to_8b(found, options.size), EIGHT[1]),
    )
    for name, steps, layers in cases:
        parts = total_seconds(steps, layers, options.tokens, options.cuts, options.together)
        print(f"  {name:18} {sum(parts.values()) / 60:7.1f} processor minutes: ", end="")
        print(", ".join(f"{what} {seconds / 60:.1f}" for what, seconds in parts.items()))


if __name__ == "__main__":
    main()
