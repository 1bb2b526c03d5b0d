"""Sizes in a plan are those of what is written, for every target and format, from the skeleton alone."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
from effc.compiler.analysis.planning.cost import PAGES
from effc.compiler.artifacts.load import load_to_judge
from effc.compiler.core.cache import Cache
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build
from effc.compiler.evaluation.metrics.bytes import Bytes

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data rows = synthetic(2, length: 16, seed: 1)
pipeline lean(base) {{ {steps} }}
emit lean {{ {target} }}
"""
STEPS = {
    "plain": "",
    "grid": "s = quantize.round(bits: 4, group: 32, zero: middle, scales: range)",
    "fine": "s = quantize.round(bits: 8, group: 0)",
    "narrow": "s = prune.channels(keep: 50% of channels)",
    "zeros": "s = sparsify.magnitude(sparsity: 50% of weights)",
    "shorter": "s = prune.blocks(remove: 1, score: perplexity(rows))",
    "skipped": "z = sparsify.magnitude(sparsity: 75% of weights)\n"
    's = lower.sparse_cpu(on: "*_proj", format: {format}, data: rows, divergence: 99.0)',
}
QUICK = [
    ("plain", 'hf("a")'),
    ("grid", 'hf("a", format: compressed)'),
    ("plain", 'native("a")'),
    ("grid", 'native("a", weights: int4)'),
    ("skipped", 'native("a", weights: int4)'),
    ("narrow", 'hf("a", form: compat)'),
    ("grid", 'gguf("a", type: q4_0)'),
    ("narrow", 'gguf("a", type: q8_0)'),
    *(("narrow", f'gguf("a", type: {kind})') for kind in ("q4_k", "iq4_nl") if find_spec("llama_cpp")),
]
SLOW = [
    ("fine", 'hf("a", format: compressed)'),
    ("plain", 'native("a", weights: int8)'),
    ("plain", 'native("a", weights: int8, head: bf16)'),
    ("plain", 'native("a", weights: int4)'),
    ("plain", 'native("a", weights: int4, group: 128, head: bf16)'),
    ("narrow", 'native("a", weights: int4)'),
    ("zeros", 'native("a", weights: int8)'),
    ("skipped", 'native("a")'),
    ("skipped", 'hf("a", form: compact)'),
    ("shorter", 'hf("a", form: compat)'),
    *(("plain", f'gguf("a", type: {kind})') for kind in ("f32", "f16", "bf16", "q8_0")),
    ("grid", 'gguf("a", type: q4_1)'),
    ("plain", 'onnx("a")'),
    ("plain", 'onnx("a", dynamic: int8)'),
    ("grid", 'onnx("a", weights: nbits)'),
    ("fine", 'onnx("a", weights: nbits)'),
    ("plain", 'pt2("a")'),
    ("narrow", 'onnx("a")'),
]


def check_sizes(folder, pipeline, target, format="sparse_int8"):
    steps = STEPS[pipeline].format(format=format)
    (folder / "r.effspec").write_text(RECIPE.format(steps=steps, target=target))
    session = api.open_session(folder / "r.effspec", cache_dir=folder / "cache", threads=1)
    (plan,) = api.plan_all_pipelines(session)
    (planned,), (emit,) = plan.emissions, plan.pipeline.emits
    ctx = session.context(plan.recipe, plan.pipeline)
    build = Build(replace(plan, pipeline=replace(plan.pipeline, emits=()), emissions=()), ctx, Cache(folder / "cache"))
    build.run(folder, force=False)
    outcome, writer = build.load_outcome(plan.key_of(emit.source)), ctx.registry.make("target", emit.call)
    (folder / "a").mkdir()
    writer.write(outcome, folder / "a", ctx)
    written = sum(file.stat().st_size for file in (folder / "a").rglob("*") if file.is_file())
    assert planned.disk_bytes - PAGES == pytest.approx(written, rel=0.03)
    form = next(form for form in writer.forms_of(outcome) if (folder / "a" / form.folder).is_dir())
    weights = Bytes().measure(load_to_judge(folder / "a" / form.folder, "cpu"), ctx)
    assert planned.weight_bytes == pytest.approx(weights, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "target"), QUICK)
def test_the_bytes_of_an_artifact_are_planned_from_the_skeleton(tmp_path, pipeline, target):
    check_sizes(tmp_path, pipeline, target)


@pytest.mark.parametrize("format", ["sparse_bf16", "dense_int4", "dense_bf16"])
@pytest.mark.slow
def test_the_bytes_of_lowered_layers_are_those_of_their_format(tmp_path, format):
    check_sizes(tmp_path, "skipped", 'native("a", weights: int8)', format)


@pytest.mark.slow
@pytest.mark.parametrize(("pipeline", "target"), SLOW)
def test_the_bytes_of_other_formats_are_planned_from_the_skeleton(tmp_path, pipeline, target):
    check_sizes(tmp_path, pipeline, target)


@pytest.mark.slow
def test_the_pages_of_an_artifact_are_part_of_the_plan(tmp_path):
    (tmp_path / "r.effspec").write_text(RECIPE.format(steps="", target='native("a", weights: int4)'))
    (plan,) = api.plan(tmp_path / "r.effspec", cache_dir=tmp_path / "cache")
    (result,) = api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache")
    files = [file for file in result.artifacts[0].path.rglob("*") if file.is_file()]
    assert plan.emissions[0].disk_bytes == pytest.approx(sum(file.stat().st_size for file in files), rel=0.03)
