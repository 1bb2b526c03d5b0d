"""Zeros that a mask made stay zero: beside adapters, merged, trained whole, sparsified again, lowered and saved."""

import copy

import pytest
import torch
from effc.compiler.driver import api
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.linear import KernelLinear, weight_of
from effc.compiler.plugin.registry import Registry
from effc.compiler.transforms.search.masks import is_sparse
from effc.compiler.transforms.training.adapters import AdapterShape, require_adaptable_modules, with_adapters
from effc.compiler.transforms.training.masks import MaskedProduct, masked_lora_product
from effc.dsl.checker.values import DataRef, Ratio
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.grids import wide
from tests.passes.test_heal import loss, rows_of
from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import defaults

HALF, ROWS = Ratio(0.5, "weights"), DataRef("rows")
TRAINED = {"data": ROWS, "steps": 12, "batch": 4}
# What every pass that may follow a mask is asked; one that is not here makes the test below fail.
ASKED = {
    "sparsify.magnitude": {"sparsity": Ratio(0.6, "weights")},
    "sparsify.wanda": {"sparsity": Ratio(0.6, "weights"), "data": ROWS},
    "sparsify.sparsegpt": None,  # moves weights, and may choose others: a mask of its own
    "sparsify.admm": None,
    "tune.heal": {**TRAINED, "lr": 1e-2},
    "tune.reft": None,  # trains what reft.insert puts in, no weight
    "quantize.round": {"group": 32},
    "quantize.gptq": {"group": 32, "data": ROWS},
    "quantize.scale": {"group": 32, "data": ROWS},
    "supernet.lora": None,  # gives no model; what is picked of it: tests/passes/test_supernet.py
    "supernet.pick": None,
    "supernet.elastic": None,  # gives no model: tests/passes/test_elastic.py
    "lower.sparse_cpu": {"format": "sparse_bf16", "divergence": 9.0},
    "lower.mixed": None,  # its formats are those of lower.sparse_cpu, and zeros its own
    "lower.sparse_kv": None,  # no weight changes
    "lower.group_queries": None,
    "lower.cpu_scan": None,
}
FAMILIES = ("sparsify", "tune", "quantize", "lower", "supernet")


def masked(tmp_path, name, *steps, pattern="any", rows=None):
    """The program after a mask by wanda, and after more steps; and the mask by path."""
    model, tmp_path = tiny.model(name), tmp_path / "run"
    tmp_path.mkdir(exist_ok=True)
    first = ("sparsify.wanda", {"sparsity": HALF, "data": ROWS, "pattern": pattern})
    made = [(f"s{i}", word, {**defaults("pass", word), **args}) for i, (word, args) in enumerate((first, *steps))]
    recipe = recipe_of(made)
    ctx = context_of(tmp_path, model, recipe, rows_of(1) if rows is None else rows)
    program, kept = capture(copy.deepcopy(model)), {}
    for i, step in enumerate(recipe.pipelines["lean"].steps):
        ctx.workdir = tmp_path / f"work{i}"
        ctx.workdir.mkdir(exist_ok=True)
        ctx.registry.make("pass", step.call).run(program, ctx)
        kept = kept or {path: weight_of(program.model.get_submodule(path)) != 0 for path in program.notes[0]["zeros"]}
    return program, kept


def matrix(module):
    """What a module multiplies with, [out, in]; of a lowered one as it computes."""
    if isinstance(module, KernelLinear):
        bias = 0 if module.bias is None else module.bias
        return (module(torch.eye(module.in_features)) - bias).T
    return weight_of(module)


def test_every_pass_that_may_follow_a_mask_is_asked():
    words = {w for w in Registry().vocabulary.words("pass") if w.partition(".")[0] in FAMILIES}
    assert words == ASKED.keys()


@pytest.mark.parametrize("word", [word for word, args in ASKED.items() if args is not None])
@pytest.mark.parametrize("name", wide(["llama", "gpt2"], {"gpt2"}))
def test_a_pass_after_a_mask_leaves_its_zeros(tmp_path, name, word):
    program, kept = masked(tmp_path, name, (word, ASKED[word]))
    for path, keep in kept.items():
        assert not matrix(program.model.get_submodule(path))[~keep].any(), path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", wide(["llama", "gpt2", "mixtral"], {"gpt2"}))
@pytest.mark.parametrize("pattern", ["any", "2:4"])
def test_a_masked_model_heals_and_its_mask_stays(tmp_path, name, method, pattern):
    lr = 1e-2 if method == "lora" else 3e-3
    before, kept = masked(tmp_path, name, pattern=pattern)
    program, _ = masked(
        tmp_path, name, ("tune.heal", {**TRAINED, "steps": 25, "method": method, "lr": lr}), pattern=pattern
    )
    assert loss(program.model) < 0.9 * loss(before.model)
    for path, keep in kept.items():
        assert torch.equal(weight_of(program.model.get_submodule(path)) != 0, keep), path


def test_zeros_that_are_to_be_filled_are(tmp_path):
    program, kept = masked(tmp_path, "llama", ("tune.heal", {**TRAINED, "lr": 1e-2, "zeros": "fill"}))
    assert all(weight_of(program.model.get_submodule(path))[~keep].any() for path, keep in kept.items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_masked_adapters_compute_what_they_did_beside_the_weights(tmp_path, name):
    program, kept = masked(tmp_path, name)
    model, ids = program.model, rows_of(3)
    with torch.no_grad():
        start = model(ids).logits
        with with_adapters(
            model, require_adaptable_modules(program, None), AdapterShape(4, 8.0, 0.0), init_seed=0
        ) as adapters:
            for place, parameter in enumerate(adapters.parameters().values()):
                generator = torch.Generator().manual_seed(place)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            beside = model(ids).logits
            adapters.merge_into_weights()
        assert (beside - start).abs().max() > 1e-2
        assert torch.allclose(model(ids).logits, beside, atol=1e-4, rtol=1e-4)  # (W + BA) x against W x + B A x
    assert all(torch.equal(weight_of(model.get_submodule(path)) != 0, keep) for path, keep in kept.items())


@given(rank=st.integers(1, 4), out=st.integers(1, 7), inside=st.integers(1, 7), seed=st.integers(0, 99))
def test_the_masked_product_has_the_gradients_of_what_it_says(rank, out, inside, seed):
    generator = torch.Generator().manual_seed(seed)
    x, a, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3, inside), (rank, inside), (out, rank))
    )
    mask = torch.rand(out, inside, generator=generator) < 0.5
    plain = x @ ((b @ a) * 0.7 * mask).T
    weigh = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((plain * weigh).sum(), (x, a, b))
    found = MaskedProduct.apply(x, a, b, mask, 0.7)
    assert torch.allclose(found, plain)
    for ours, theirs in zip(torch.autograd.grad((found * weigh).sum(), (x, a, b)), expected, strict=True):
        assert torch.allclose(ours, theirs)
    assert not masked_lora_product(a, b, mask, 0.7)[~mask].any()


def test_a_few_zeros_or_nothing_but_zeros_are_no_mask():
    weight = torch.randn(20, 20)
    weight[0, :3] = 0
    assert not is_sparse(weight) and not is_sparse(torch.zeros(4, 4))
    weight[0, 3] = 0
    assert is_sparse(weight)  # 4 of 400


@pytest.mark.slow
def test_a_recipe_sparsifies_heals_and_saves(tmp_path):
    (tmp_path / "lean.effspec").write_text(f"""effspec 1
model base = zoo("tiny-llama")
data few = text("{zoo_folders_by_name()["tiny-llama"]}/calib.txt", samples: 4, length: 32, seed: 7)
pipeline lean(base) {{
  sps = sparsify.wanda(on: "layers.{{0,1}}.mlp.*_proj", sparsity: 50% of weights, data: few, pattern: "2:4")
  fit = tune.heal(data: few, steps: 2, batch: 2)
}}
emit lean {{ hf("lean") }}
""")
    (result,) = api.compile(tmp_path / "lean.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    assert all(check.holds for check in result.artifacts[0].manifest.checks)
    model = api.load(tmp_path / "out/lean")
    for layer in model.model.layers[:2]:
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            assert ((module.weight == 0).view(-1, 4).sum(1) == 2).all()
