"""What steps make of large weights lies in files of the cache, and the original is not loaded twice."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from effc.compiler.core.cache import LARGE, Cache
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "dtype": "float32",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
RECIPE = """effspec 1
model base = config("mid.json", seed: 1)
data  rows = synthetic(2, length: 16, seed: 1)
pipeline lean(base) {{
  {step}
}}
emit lean {{ hf("lean") }}
"""


def build(folder, step):
    (folder / "mid.json").write_text(json.dumps(CONFIG))
    (folder / "r.effspec").write_text(RECIPE.format(step=step))
    session = api.open_session(folder / "r.effspec", cache_dir=folder / "cache", threads=1)
    loads = []
    call = next(iter(session.recipes(resolve=True)[0].models.values()))
    origin = session.resolve_model_origin(call)
    counted = replace(origin, load=lambda: loads.append(1) or origin.load())
    session.origins = dict.fromkeys(session.origins, counted)
    (plan,) = api.plan_all_pipelines(session)
    return Build(plan, session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir)), loads


def files_under(tensor: torch.Tensor) -> str:
    """The path of the file that a tensor's memory is mapped from; "" where it is from none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
@pytest.mark.parametrize(
    "step",
    [
        "s = sparsify.wanda(sparsity: 50% of weights, data: rows)",
        "s = sparsify.sparsegpt(sparsity: 50% of weights, data: rows)",
        "s = prune.channels(keep: 75% of channels)",
    ],
)
@pytest.mark.slow
def test_large_weights_of_a_step_are_mapped_and_are_those_that_a_later_run_reads(tmp_path, step):
    made, _ = build(tmp_path, step)
    made.run_step_unless_cached(made.plan.stages[0])
    program = made.results.outcome.program
    large = {n: p for n, p in program.model.named_parameters() if p.nbytes >= LARGE and "mlp" in n}
    assert large
    for name, parameter in large.items():
        assert str(tmp_path / "cache" / "blobs") in files_under(parameter), name
    values = {name: parameter.detach().clone() for name, parameter in program.model.named_parameters()}
    again, _ = build(tmp_path, step)
    for name, parameter in again.load_outcome(again.plan.stages[0].key).program.model.named_parameters():
        assert torch.equal(parameter, values[name]), name


@pytest.mark.slow
def test_rows_of_the_original_are_written_by_the_program_while_it_is_the_original(tmp_path):
    made, loads = build(tmp_path, "s = prune.multi(remove: 10% of params, group: 256, score: perplexity(rows))")
    made.run_step_unless_cached(made.plan.stages[0])
    alone, other = build(tmp_path, "s = sparsify.magnitude(sparsity: 50% of weights)")
    alone.run_step_unless_cached(alone.plan.stages[0])
    assert len(other) == 1, "once to work on"
    assert len(loads) == 2, "once to work on and once to hash it, but not to write rows"
