"""supernet.*: adapters of elastic rank, the choices among them, and what a choice computes on its own."""

import copy
import json

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.driver import api
from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.linear import weight_of
from effc.compiler.ir.outcome import Model
from effc.compiler.transforms.supernet.choices import ChoiceSampler, ElasticDim, Space
from effc.compiler.transforms.supernet.family import Family
from effc.compiler.transforms.training.adapters import AdapterShape, require_adaptable_modules, with_adapters
from effc.compiler.transforms.training.rounded_adapters import RoundedProduct
from effc.dsl.checker.values import DataRef, Ratio
from effc.kernels.grid import Grid
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.grids import wide
from tests.passes.test_heal import loss, rows_of
from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import defaults, refused

ROWS = DataRef("rows")
NET = {"ranks": [8, 4, 2], "data": ROWS, "steps": 30, "batch": 4, "lr": 1e-2, "dropout": 0.0}


def through(tmp_path, model, *steps):
    """What the last of some steps gives."""
    made = [(f"s{i}", word, {**defaults("pass", word), **args}) for i, (word, args) in enumerate(steps)]
    recipe, outcome = recipe_of(made), Model(capture(copy.deepcopy(model)))
    tmp_path.mkdir(exist_ok=True)
    ctx = context_of(tmp_path, model, recipe, rows_of(1))
    for i, step in enumerate(recipe.pipelines["lean"].steps):
        ctx.workdir = tmp_path / f"work{i}"
        outcome = ctx.registry.make("pass", step.call).result_of(outcome, ctx)
    return outcome


@given(
    ranks=st.lists(st.integers(1, 64), min_size=2, max_size=4, unique=True),
    sites=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_choice_is_drawn_and_a_step_draws_the_same_again(ranks, sites, seed):
    values, names = tuple(sorted(ranks, reverse=True)), [f"s{i}" for i in range(sites)]
    space = Space(tuple(ElasticDim(name, "rank", values, (f"{name}.a", f"{name}.b")) for name in names))
    drawn, seen = ChoiceSampler(space, seed), {name: set() for name in names}
    for step in range(120):
        drawn.draw_and_activate_first(step)
        first = dict(drawn.ranks)
        drawn.draw_and_activate_first(step)
        assert drawn.ranks == first and all(first[f"{site}.a"] == first[f"{site}.b"] for site in names)
        for site in names:
            seen[site].add(first[f"{site}.a"])
    assert all(ranks_ == set(ranks) for ranks_ in seen.values())
    assert space.choice("largest")["s0"] == max(ranks) and space.choice("smallest")["s0"] == min(ranks)
    assert space.choice("middle")["s0"] == sorted(ranks, reverse=True)[(len(ranks) - 1) // 2]


def family_of(name, mask, per="layer", ranks=(8, 4, 2)):
    """A family with random adapters, beside which nothing is trained."""
    program = capture(tiny.model(name))
    paths = require_adaptable_modules(program, None)
    if mask:
        for path in paths:
            weight = program.model.get_submodule(path).weight
            chance = torch.Generator().manual_seed(len(path))
            weight.data *= torch.rand(weight.shape, generator=chance) < 0.5
    shape, generator, tensors = AdapterShape(max(ranks), 16.0, 0.0), torch.Generator().manual_seed(0), {}
    for path in paths:
        n, k = weight_of(program.model.get_submodule(path)).shape
        tensors[f"{path}.lora_A"] = torch.randn(max(ranks), k, generator=generator) * 0.1
        tensors[f"{path}.lora_B"] = torch.randn(n, max(ranks), generator=generator) * 0.1
    return Family(program, "", Space.of_ranks(paths, per, skeleton_of(program), ranks), shape, tensors, mask)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("per", ["layer", "module", "kind"])
def test_a_choice_alone_computes_what_it_did_within_the_family(name, mask, per):
    family, ids = family_of(name, mask, per), rows_of(3)
    model, choice, zeros = family.program.model, family.space.draw(seed=5), "keep" if mask else "fill"
    with torch.no_grad():
        start = model(ids).logits
        ranks = family.space.by_path(choice, "rank")
        with with_adapters(model, tuple(ranks), family.shape, 0, zeros=zeros) as adapters:
            adapters.load(family.tensors)
            adapters.follow_ranks(ranks)
            within = model(ids).logits
        with family.with_choice_applied(choice):
            alone = model(ids).logits
        with family.with_choice_applied(family.space.choice("largest")):
            largest = model(ids).logits
        with with_adapters(model, tuple(ranks), family.shape, 0, zeros=zeros) as adapters:
            adapters.load(family.tensors)
            whole = model(ids).logits
        assert torch.equal(model(ids).logits, start)
    assert (within - start).abs().max() > 1e-2 and (largest - within).abs().max() > 1e-2
    assert torch.allclose(alone, within, atol=1e-5, rtol=1e-5)
    assert torch.equal(largest, whole)


def test_smaller_choices_are_the_first_ranks_of_larger_ones():
    family = family_of("llama", mask=False)
    small, large = (family.extract_adapters(family.space.choice(how)) for how in ("smallest", "largest"))
    for name, tensor in small.items():
        assert torch.equal(tensor, large[name][tuple(slice(n) for n in tensor.shape)])
    assert (
        Family.from_json_assigning_weights(json.loads(json.dumps(family.to_json())), family.program, family.tensors)
        == family
    )


@pytest.mark.parametrize("ranks", ["largest", "middle", "smallest"])
def test_every_choice_of_a_trained_family_predicts_better(tmp_path, ranks):
    model = tiny.model("llama")
    picked = through(tmp_path, model, ("supernet.lora", NET), ("supernet.pick", {"ranks": ranks}))
    assert loss(picked.program.model) < 0.8 * loss(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_zeros_stay_zero_when_a_choice_is_merged(tmp_path, name):
    mask = ("sparsify.wanda", {"sparsity": Ratio(0.5, "weights"), "data": ROWS})
    sparse = through(tmp_path / "sparse", tiny.model(name), mask).program
    picked = through(tmp_path / "picked", tiny.model(name), mask, ("supernet.lora", NET), ("supernet.pick", {}))
    assert loss(picked.program.model) < 0.9 * loss(sparse.model)
    for path in sparse.notes[0]["zeros"]:
        before, after = (weight_of(p.model.get_submodule(path)) for p in (sparse, picked.program))
        assert torch.equal(before != 0, after != 0) and not torch.equal(before, after)


@given(seed=st.integers(0, 99), sparse=st.booleans())
def test_what_is_rounded_with_its_adapter_gives_and_learns_what_its_matrix_says(seed, sparse):
    chance = torch.Generator().manual_seed(seed)
    w, x = torch.randn(6, 8, generator=chance), torch.randn(2, 3, 8, generator=chance).requires_grad_()
    a, b = (torch.randn(n, k, generator=chance).requires_grad_() for n, k in ((2, 8), (6, 2)))
    mask = torch.rand(6, 8, generator=chance) < 0.5 if sparse else torch.ones(6, 8, dtype=torch.bool)
    w *= mask
    scales = Grid(4, 4, False, False).fit_scales(w)
    y = x @ w.T + RoundedProduct.apply(x, a, b, mask, 0.5, w, scales)
    moved = w + torch.where(mask, 0.5 * (b @ a), 0.0)
    s, z = (t.repeat_interleave(4, 1) for t in (scales.scale, scales.zero))
    on_grid = (s * (((moved / s).round() + z).clamp(0, 15) - z)).detach()
    assert torch.allclose(y, x @ on_grid.T, atol=1e-4) and bool((on_grid[~mask] == 0).all())
    slopes = torch.autograd.grad(y.square().sum(), (x, a, b))
    naive = x @ (moved + (on_grid - moved).detach()).T  # gradients go past the rounding
    for found, wanted in zip(slopes, torch.autograd.grad(naive.square().sum(), (x, a, b)), strict=True):
        assert torch.allclose(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_choice_that_was_trained_through_a_grid_is_on_it_when_it_is_merged(tmp_path):
    model, ids, coarse = tiny.model("llama"), rows_of(3), {"bits": 3, "group": 32}
    mask = ("sparsify.wanda", {"sparsity": Ratio(0.5, "weights"), "data": ROWS})
    net = through(tmp_path / "net", model, mask, ("supernet.lora", {**NET, **coarse}))
    rounded = through(tmp_path / "rounded", model, mask, ("quantize.round", coarse)).program
    again = Family.from_json_assigning_weights(
        json.loads(json.dumps(net.to_json())), copy.deepcopy(net.program), net.tensors
    )
    choice = net.space.choice("middle")
    before = {path: weight_of(net.program.model.get_submodule(path)).clone() for path in net.paths}
    with torch.no_grad(), net.with_choice_applied(choice):
        within = net.program.model(ids).logits
    cut = again.cut_program_to_choice(choice).model
    with torch.no_grad():
        assert torch.allclose(cut(ids).logits, within, atol=1e-4)
    assert loss(cut) < 0.95 * loss(rounded.model)
    for path, weight in before.items():
        merged = weight_of(cut.get_submodule(path))
        groups = merged.unflatten(1, (-1, 32)).flatten(0, 1)
        assert max(len(group.unique()) for group in groups) <= 8 and not merged[weight == 0].any()
    steps = (("supernet.lora", {**NET, "steps": 1, **coarse}), ("supernet.pick", {"merge": False}))
    assert refused(lambda: through(tmp_path / "apart", model, *steps)).diagnostics[0].slug == "rounded-apart"


def test_layers_that_run_again_meet_the_ranks_that_the_loss_was_of(tmp_path):
    plain, again = (
        through(
            tmp_path / str(on),
            tiny.model("llama"),
            ("supernet.lora", {**NET, "steps": 5, "gradient_checkpointing": on}),
        ).tensors
        for on in (False, True)
    )
    assert all(torch.allclose(plain[name], again[name], atol=1e-5) for name in plain)


@pytest.mark.slow
def test_the_seed_decides_the_family_bit_for_bit(tmp_path):
    one, other = (
        through(tmp_path / name, tiny.model("llama"), ("supernet.lora", {**NET, "dropout": 0.1})).tensors
        for name in "ab"
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ranks_that_can_not_be_are_refused_before_weights_are_read(tmp_path):
    model, args = tiny.model("llama"), {**NET, "ranks": [80, 4]}
    recipe = recipe_of([("net", "supernet.lora", {**defaults("pass", "supernet.lora"), **args})])
    step = context_of(tmp_path, model, recipe).registry.make("pass", recipe.pipelines["lean"].steps[0].call)
    found = refused(lambda: step.forecast(skeleton_of(capture(model)))).diagnostics[0]
    assert found.slug == "unfit-ranks" and "at most 64" in found.help
    assert "rank 80 is more than model.layers.0.self_attn.q_proj has: it is 64 wide" in found.message


def test_masked_adapters_are_not_given_apart(tmp_path):
    mask = ("sparsify.magnitude", {"sparsity": Ratio(0.5, "weights")})
    steps = (mask, ("supernet.lora", {**NET, "steps": 2}), ("supernet.pick", {"merge": False}))
    found = refused(lambda: through(tmp_path, tiny.model("llama"), *steps)).diagnostics[0]
    assert found.slug == "masked-apart" and "zeros: fill" in found.help


RECIPE = """effspec 1
model base = zoo("tiny-llama")
data few = text("{zoo}/calib.txt", samples: 4, length: 32, seed: 7)
pipeline lean(base) {{
  sps = sparsify.magnitude(on: "layers.0.mlp.*_proj", sparsity: 50% of weights)
  net = supernet.lora(ranks: [8, 4], data: few, steps: 4, batch: 2, lr: 1e-2, zeros: {zeros}{on})
  out = supernet.pick(ranks: smallest{merge})
}}
emit lean {{ {target} }}
"""


@pytest.mark.parametrize(
    ("zeros", "merge", "target"),
    wide(
        [("keep", "", 'hf("out")'), ("fill", ", merge: false", 'peft("out")')],
        {("fill", ", merge: false", 'peft("out")')},
    ),
)
@pytest.mark.slow
def test_a_choice_is_emitted_reopened_and_computes_the_same(tmp_path, zeros, merge, target):
    text = RECIPE.format(zoo=zoo_folders_by_name()["tiny-llama"], zeros=zeros, merge=merge, target=target, on="")
    (tmp_path / "lean.effspec").write_text(text)
    (result,) = api.compile(tmp_path / "lean.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    checks = result.artifacts[0].manifest.checks
    assert checks and all(check.holds for check in checks)
    if merge:
        config = json.loads((tmp_path / "out/out/adapter/adapter_config.json").read_text())
        assert set(config["rank_pattern"].values()) == {4} and config["r"] == 8
    else:
        gate = api.load(tmp_path / "out/out").model.layers[0].mlp.gate_proj.weight
        assert abs(float((gate == 0).float().mean()) - 0.5) < 0.01


def test_a_family_itself_is_no_target_s(tmp_path):
    text = RECIPE.format(zoo=zoo_folders_by_name()["tiny-llama"], zeros="keep", merge="", target='hf("out")', on="")
    (tmp_path / "lean.effspec").write_text(
        "".join(line for line in text.splitlines(keepends=True) if "pick" not in line)
    )
    found = api.open_session(tmp_path / "lean.effspec", cache_dir=tmp_path).check().diagnostics[0]
    assert "a family of models" in found.message
