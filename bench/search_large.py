"""Print what prune.multi takes on random Llamas of 0.13 B to 1.07 B parameters, beside what `plan` foresees.

    python -m bench.search_large [SIZE ...] [--share 0.1] [--tokens 1024] [--threads 2] [--max-memory 6]
                                       [--more "estimate: taylor"] [--folder FOLDER]

Checkpoints are made on the spot in bfloat16, layer by layer, and kept in `--folder`: of 1.07 B parameters it takes
2 GiB there. Weights are random: what is searched for has no meaning, what it costs has. Wall seconds are of a machine
with whatever else runs on it; processor seconds, over the threads, say what an idle one would take at most. `resident`
is the process's VmHWM, pages of the mapped checkpoint included; `held` the most anonymous memory. Operations of scores
are those of layers and head; the rest is what writing, ranking and refitting take.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

SIZES = {  # hidden, layers, heads, KV heads, MLP, vocabulary
    "0.13b": (576, 30, 9, 3, 1536, 49152),
    "0.4b": (1024, 24, 16, 4, 4096, 49152),
    "1b": (2048, 16, 32, 8, 8192, 49152),
}
GROUP = {"0.13b": 128, "0.4b": 256, "1b": 512}
RECIPE = """effspec 1
model base = hf("{folder}")
data  rows = synthetic({rows}, length: 256, seed: 0)
pipeline lean(base) {{ slim = prune.multi(remove: {share:g}% of params, group: {group}, {more} score: perplexity(rows)) }}
emit lean {{ hf("lean") }}
"""


def write_random_checkpoint(folder: Path, size: str) -> None:
    """A checkpoint of random weights, a layer at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    hidden, layers, heads, kv, mlp, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator, places = torch.Generator().manual_seed(0), {}

    def keep(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {n: (torch.randn(*s, generator=generator) * 0.02).bfloat16() for n, s in shapes.items() if len(s) > 1}
        tensors |= {n: torch.ones(s, dtype=torch.bfloat16) for n, s in shapes.items() if len(s) == 1}
        save_file(tensors, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(shapes, file))

    keep("first.safetensors", {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)})
    head = hidden // heads
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes = {f"{at}.self_attn.{n}_proj.weight": (kv * head, hidden) for n in "kv"}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qo"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (mlp, hidden) for n in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, mlp)}
        shapes |= {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        keep(f"layer-{layer:02}.safetensors", shapes)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def run_search(model_folder: Path, model_size: str, options: argparse.Namespace) -> dict[str, float]:
    """One search in this process."""
    import torch
    from effc.compiler.core.cache import Cache
    from effc.compiler.core.events import Recorded, Said, Ticked
    from effc.compiler.driver.api import open_session, plan_all_pipelines
    from effc.compiler.driver.pipeline import Build

    torch.set_num_threads(options.threads)
    recipe, cache = model_folder.parent / f"{model_size}.effspec", options.folder / f"cache-{os.getpid()}"
    more = f"{options.more}," if options.more else ""
    recipe.write_text(
        RECIPE.format(
            folder=model_folder.resolve(),
            rows=options.tokens // 256,
            share=100 * options.share,
            group=GROUP[model_size],
            more=more,
        )
    )
    said, last = {}, [0.0]

    def tell(event) -> None:
        if isinstance(event, Recorded):
            said[event.name] = event.value
            print(f"{time.process_time():8.0f} s  {event.name} {event.value:.6g}", file=sys.stderr, flush=True)
        elif isinstance(event, Said):
            print(event, file=sys.stderr, flush=True)
        elif isinstance(event, Ticked) and time.monotonic() > last[0] + 15:
            last[0] = time.monotonic()
            print(f"{time.process_time():8.0f} s  {event}", file=sys.stderr, flush=True)

    opened = open_session(recipe, cache_dir=cache, threads=options.threads, max_memory=int(options.max_memory * 2**30))
    opened.settings = replace(opened.settings, on_event=tell)
    (plan,) = plan_all_pipelines(opened)
    stage = plan.stages[0]
    build = Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(cache))
    started, busy = time.perf_counter(), time.process_time()
    build.run_step_unless_cached(stage)
    kept = Path("/proc/self/status").read_text()
    program = build.load_outcome(stage.key).program
    rounds = [note["scores"] for note in program.notes if "scores" in note]
    return {
        "cuts": len(rounds),
        "scored": sum(map(len, rounds)),
        "left_out": next((n["left_out"] for n in reversed(program.notes) if "left_out" in n), 0),
        "forwards": said["layer forwards"],
        "own": said["layer forwards to rank and refit"],
        "wall_s": time.perf_counter() - started,
        "processor_s": time.process_time() - busy,
        "plan_s": stage.seconds,
        "plan_scores": stage.forwards,
        "resident_gib": int(kept.split("VmHWM:")[1].split()[0]) / 2**20,
        "held_gib": build.costs[stage.name]["peak_bytes"] / 2**30,
        "plan_gib": stage.peak_bytes / 2**30,
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["1b"], help=", ".join(SIZES))
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-memory", type=float, default=6, help="GiB")
    parser.add_argument("--more", default="", help="more arguments of prune.multi")
    parser.add_argument("--folder", type=Path, default=Path("build/large"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return print(json.dumps(run_search(options.folder / options.sizes[0], options.sizes[0], options)))
    from effc.compiler.core.fingerprint import machine_facts

    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), f"{options.tokens} tokens scored", sep=", ")
    for size in options.sizes:
        write_random_checkpoint(options.folder / size, size)
        again = [sys.executable, "-m", "bench.search_large", *sys.argv[1:], "--inside"]
        again = [a for a in again if a not in options.sizes] + [size]
        done = subprocess.run(again, stdout=subprocess.PIPE, text=True, check=True)
        print(json.dumps({"size": size, **json.loads(done.stdout)}), flush=True)


if __name__ == "__main__":
    main()
