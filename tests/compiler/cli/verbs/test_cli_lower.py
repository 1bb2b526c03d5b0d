"""sparsify and lower in recipes: what check refuses, what compile writes, and what its manifest says."""

import json

import pytest

RECIPE = """effspec 1
model base = zoo("tiny-llama")
data calib = text("{texts}/calib.txt", samples: 2, length: 64, seed: 7)
pipeline lean(base) {{
  {steps}
}}
emit lean {{ {target} }}
"""
SPARSE = 'sps = sparsify.magnitude(on: "*.mlp.*_proj", sparsity: 80% of weights, pattern: blocks)'
LOWER = 'cpu = lower.sparse_cpu(on: "*.mlp.*_proj", format: block, data: calib, divergence: 1.0)'


@pytest.fixture
def recipe(tmp_path):
    from effc.compiler.inputs.sources.zoo import zoo_folders_by_name

    def written(*steps: str, target: str = 'hf("out")'):
        path = tmp_path / "lean.effspec"
        path.write_text(
            RECIPE.format(texts=zoo_folders_by_name()["tiny-llama"], steps="\n  ".join(steps), target=target)
        )
        return path

    return written


@pytest.mark.parametrize(
    ("steps", "target", "slug", "said"),
    [
        ((LOWER,), 'hf("out", form: stock)', "cannot-hold", "can't hold the packed weights that `cpu` makes"),
        ((LOWER,), 'hf("out", form: compat)', "cannot-hold", "packed weights"),
        (("kv = lower.sparse_kv(keep: 50%, data: calib)",), 'hf("out", form: stock)', "cannot-hold", "pruned caches"),
        ((LOWER, SPARSE), 'hf("out")', "wrong-order", "lower.sparse_cpu must come after sparsify.magnitude"),
        (("sps = sparsify.magnitude(sparsity: 0% of weights)",), 'hf("out")', "out-of-range", "`sparsity`"),
        (("sps = sparsify.wanda(sparsity: 50% of weights)",), 'hf("out")', "missing-parameter", "`data`"),
        (("cpu = lower.sparse_cpu(isa: avx1024)",), 'hf("out")', "", "avx1024"),
        (("kv = lower.sparse_kv(keep: 0%)",), 'hf("out")', "out-of-range", "`keep`"),
        ((SPARSE,), 'pt2("out", context: 24)', "out-of-range", "`context`"),
    ],
)
def test_check_refuses_before_any_weight_is_read(effc, recipe, steps, target, slug, said):
    run = effc("check", recipe(*steps, target=target))
    assert run.code == 3 and said in run.err and slug in run.err


@pytest.mark.slow
def test_a_masked_and_lowered_model_compiles_and_says_what_became_of_each_module(effc, recipe):
    path = recipe(SPARSE, LOWER)
    run = effc("compile", path, "-o", "out", "--no-progress", "--threads", 1)
    assert run.code == 0, run.err
    manifest = json.loads((path.parent / "out/out/manifest.json").read_text())
    masked, lowered = (step["decisions"][-1] for step in manifest["steps"])
    assert 0.79 < masked["sparsity"] < 0.81 and len(masked["zeros"]) == 24
    assert {entry["format"] for entry in lowered["lowered"]} == {"block"}
    assert all(entry["bytes"] < 0.2 * entry["bytes_before"] for entry in lowered["lowered"])  # float32 before
    assert lowered["accuracy"]["divergence"] <= 1.0 and lowered["accuracy"]["perplexity"] > 1
    card = (path.parent / "out/out/README.md").read_text()
    assert "## Kernels" in card and "| 384 x 128 | 16 | block | 80 % |" in card
    assert "24 linear modules on kernels" in card
    again = effc("compile", path, "-o", "again", "--no-progress", "--threads", 1)
    assert (
        again.code == 0
        and json.loads((path.parent / "again/out/manifest.json").read_text())["files"] == manifest["files"]
    )


@pytest.mark.slow
def test_a_divergence_beyond_the_bound_leaves_with_the_code_of_a_missed_expectation(effc, recipe):
    run = effc("compile", recipe(LOWER.replace("divergence: 1.0", "divergence: 0.0")), "-o", "out", "--no-progress")
    assert run.code == 4 and "lowering-inaccurate" in run.err and "model.layers." in run.err
