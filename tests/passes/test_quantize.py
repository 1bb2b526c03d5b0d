"""quantize.*: which values weights take, what is given back, and what is refused."""

import copy

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.linear import weight_of
from effc.compiler.transforms.search import descent
from effc.compiler.transforms.search.updates import solve_gptq
from effc.dsl.checker.values import DataRef, Ratio
from effc.kernels.grid import Grid
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.passes.test_layerwise import problem
from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import defaults, refused


def run(tmp_path, model, *steps):
    """The program after passes, and its last note."""
    made = [(f"s{i}", word, {**defaults("pass", word), **args}) for i, (word, args) in enumerate(steps)]
    recipe, program = recipe_of(made), capture(copy.deepcopy(model))
    ctx = context_of(tmp_path, model, recipe)
    for i, step in enumerate(recipe.pipelines["lean"].steps):
        ctx.workdir = tmp_path / f"work{i}"
        ctx.registry.make("pass", step.call).run(program, ctx)
    return program, program.notes[-1]


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([0, 4, 8]),
    symmetric=st.booleans(),
    search=st.booleans(),
    seed=st.integers(0, 99),
)
def test_few_values_a_group_zero_among_them(bits, group, symmetric, search, seed):
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    weight[0, :8], weight[1, 8:] = 0, weight[1, 8:].abs()
    scales = Grid(bits, group, symmetric, search).fit_scales(weight)
    found = scales.round(weight)
    for row in found.view(-1, group or 16):
        assert len(row.unique()) <= 2**bits
    assert not found[weight == 0].any()
    assert torch.allclose(scales.round(found), found, atol=1e-6)  # what is on the grid stays there


@given(group=st.sampled_from([0, 4]), bits=st.integers(3, 8), seed=st.integers(0, 99))
def test_over_the_whole_range_rounding_is_off_by_a_step_at_most_and_a_search_is_no_worse(group, bits, seed):
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    scales = Grid(bits, group, False, False).fit_scales(weight)
    step = scales.scale.repeat_interleave(16 // scales.scale.shape[1], 1)
    # Half a step, and as much again at the ends, as the zero is rounded, too.
    assert ((scales.round(weight) - weight).abs() <= 1.0001 * step).all()
    searched = Grid(bits, group, False, True).fit_scales(weight).round(weight)
    assert (searched - weight).square().sum() <= (scales.round(weight) - weight).square().sum() + 1e-9


def naive_gptq(weight, gram, grid, order, keep, damping=0.01):
    """One column after another, by the inverse over the columns that are not settled yet."""
    w, h = weight.double().clone(), gram.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    scales = grid.fit_scales(weight, gram.diagonal())
    left = sorted(range(len(h)), key=lambda j: -float(gram[j, j])) if order == "activation" else list(range(len(h)))
    while left:
        inverse, j = torch.linalg.inv(h[left][:, left]), left[0]
        group = j // grid.width(len(h))
        if order == "given" and j % grid.width(len(h)) == 0:
            late = grid.fit_scales(
                w[:, j : j + grid.width(len(h))].float(), gram.diagonal()[j : j + grid.width(len(h))]
            )
        new = late.round_column(w[:, j].float(), 0) if order == "given" else scales.round_column(w[:, j].float(), group)
        new = new if keep is None else torch.where(keep[:, j], new, 0.0)
        error = (w[:, j] - new) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        w[:, j] = new.double()
        left = left[1:]
    return w


@pytest.mark.parametrize("order", ["activation", "given"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("search", [False, True])
def test_gptq_settles_weights_as_a_naive_one_does(order, sparse, search):
    weight, _, gram = problem(5, 160, seed=3)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5 if sparse else None
    weight = weight if keep is None else weight * keep
    grid = Grid(4, 32, False, search)
    found, expected = solve_gptq(weight, gram, grid, order, keep), naive_gptq(weight, gram, grid, order, keep)
    # A sum in float32 may fall to the other side of a rounding, and what follows with it: a few in a hundred.
    assert ((found - expected).abs() < 1e-3).float().mean() > 0.9
    assert keep is None or not found[~keep].any()


def naive_sweep(weight, gram, scales, values, keep):
    """Every weight by itself, by trying all values of its grid."""
    found, width = values.double().clone(), weight.shape[1] // scales.scale.shape[1]
    steps = torch.arange(scales.max_code + 1)
    for j in range(weight.shape[1]):
        for i in range(len(weight)):
            if keep is not None and not keep[i, j]:
                continue
            group, losses = j // width, []
            tried = (scales.scale[i, group] * (steps - scales.zero[i, group])).double()
            for value in tried:
                apart = found[i] - weight[i]
                apart[j] = value - weight[i, j]
                losses.append(float(apart @ gram @ apart))
            found[i, j] = tried[min(range(len(losses)), key=losses.__getitem__)]
    return found


def naive_scales(weight, gram, scales, values):
    """Scales of all groups of an output by least squares over the inputs' root."""
    root, best = torch.linalg.cholesky(gram).T, scales.scale.clone()
    for i, row in enumerate((values.unflatten(1, (scales.scale.shape[1], -1)) / scales.scale[:, :, None]).double()):
        columns = torch.block_diag(*row.round()[:, None]).T  # [in, groups]
        best[i] = torch.linalg.lstsq(root @ columns, root @ weight[i, :, None]).solution[:, 0].bfloat16()
    return best


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_and_scales_are_looked_at_again_as_a_naive_search_does(symmetric, sparse):
    weight, _, gram = (t.double() for t in problem(4, 32, seed=5))
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5 if sparse else None
    weight = weight if keep is None else weight * keep
    scales = Grid(3, 8, symmetric, False).fit_scales(weight.float())
    first = scales.round(weight.float())
    fitted = descent.refit_scales_and_values(weight.float(), gram.float(), scales, first)[0]
    gained = (fitted.scale != scales.scale).any(1)
    assert gained.any() and torch.equal(fitted.scale[gained], naive_scales(weight, gram, scales, first)[gained])
    found = descent.sweep_coordinate_descent(weight.float(), gram.float(), scales, first, keep)
    assert torch.allclose(found.double(), naive_sweep(weight, gram, scales, first, keep), atol=1e-6)


def test_scales_of_many_groups_are_fitted_in_slices_and_by_any_number_of_threads(monkeypatch):
    weight, _, gram = problem(6, 1280, seed=3)
    scales, before, found = Grid(3, 8, True, False).fit_scales(weight), torch.get_num_threads(), []
    first = scales.round(weight)
    for threads, squares in ((1, 1 << 23), (2, 1 << 23), (2, 160**2)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(descent, "SQUARES", squares)
        try:
            found.append(descent.refit_scales_and_values(weight, gram, scales, first)[0].scale)
        finally:
            torch.set_num_threads(before)
    assert (found[0] != scales.scale).any() and all(torch.allclose(found[0], other, rtol=0.01) for other in found)


@pytest.mark.slow
@settings(max_examples=30)
@given(sweeps=st.integers(1, 4), symmetric=st.booleans(), sparse=st.booleans(), seed=st.integers(0, 99))
def test_no_sweep_raises_the_error_or_leaves_the_grid(sweeps, symmetric, sparse, seed):
    weight, _, gram = problem(6, 160, seed)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5 if sparse else None
    weight, grid = weight if keep is None else weight * keep, Grid(4, 32, symmetric, True)
    damped = gram.double() + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))

    def lost(values):
        apart = values.double() - weight
        return ((apart @ damped) * apart).sum(1)

    before, after = (solve_gptq(weight, gram, grid, "activation", keep, sweep_count=n) for n in (sweeps - 1, sweeps))
    assert (lost(after) <= lost(before) * (1 + 1e-4)).all()  # sums are float32
    assert keep is None or not after[~keep].any()
    assert all(len(row.unique()) <= 16 for row in after.view(-1, 32))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_given_back_and_searched_loses_less(seed, symmetric):
    weight, x, _ = problem(32, 64, seed)
    x = x * torch.randn(64, generator=torch.Generator().manual_seed(seed)).exp()  # some inputs are large
    gram = x.T @ x
    plain, better = Grid(4, 32, symmetric, False), Grid(4, 32, symmetric, True)

    def lost(w):
        return float(((w - weight) @ x.T).square().sum())

    nearest = lost(plain.fit_scales(weight).round(weight))
    published = lost(solve_gptq(weight, gram, plain, "given", None))
    ours = lost(solve_gptq(weight, gram, better, "activation", None))
    again = lost(solve_gptq(weight, gram, better, "activation", None, sweep_count=2))
    assert again < ours < published < nearest


@pytest.mark.parametrize("word", ["round", "gptq"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("group", [0, 32])
def test_modules_hold_few_values_and_keep_their_type(tmp_path, name, word, group):
    model = tiny.model(name)
    args = {"bits": 3, "group": group} | ({"data": DataRef("rows")} if word == "gptq" else {})
    program, note = run(tmp_path, model, (f"quantize.{word}", args))
    assert note["bits"] == 3 and 3 < note["bits_per_weight"] < 4
    for path in note["quantized"]:
        weight = weight_of(program.model.get_submodule(path))
        assert type(program.model.get_submodule(path)) is type(model.get_submodule(path))
        assert all(len(row.unique()) <= 8 for row in weight.reshape(-1, group or weight.shape[1]))
        before = weight_of(model.get_submodule(path))
        assert note["errors"][path] == pytest.approx(float((weight - before).norm() / before.norm()), abs=1e-4)
    changed = {n for n, p in program.model.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == {f"{path}.weight" for path in note["quantized"]}


@pytest.mark.parametrize("word", ["round", "gptq"])
def test_a_sparse_matrix_on_four_bits_keeps_its_mask(tmp_path, word):
    more = {"data": DataRef("rows")} if word == "gptq" else {}
    mask = ("sparsify.magnitude", {"sparsity": Ratio(0.5, "weights"), "pattern": "2:4"})
    program, note = run(tmp_path, tiny.model("llama"), mask, (f"quantize.{word}", {"bits": 4, "group": 32, **more}))
    for path in note["quantized"]:
        weight = program.model.get_submodule(path).weight
        assert ((weight == 0).view(-1, 4).sum(1) >= 2).all()


@pytest.mark.parametrize("word", ["round", "gptq"])
@pytest.mark.parametrize(
    ("width", "remedy"), [(90, "write `group: 45`, or `group: 0` for one"), (67, "write `group: 0` for one")]
)
def test_groups_that_do_not_divide_are_refused_before_weights_are_read(tmp_path, word, width, remedy):
    model = tiny.model("llama", intermediate_size=width)
    args = {"group": 64, "bits": 4} | ({"data": DataRef("rows")} if word == "gptq" else {})
    recipe = recipe_of([("q", f"quantize.{word}", {**defaults("pass", f"quantize.{word}"), **args})])
    step = context_of(tmp_path, model, recipe).registry.make("pass", recipe.pipelines["lean"].steps[0].call)
    found = refused(lambda: step.forecast(skeleton_of(capture(model)))).diagnostics[0]
    assert found.slug == "unfit-group" and f"model.layers.0.mlp.down_proj has {width} inputs" in found.message
    assert remedy in found.help
