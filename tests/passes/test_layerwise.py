"""Layers one after another: what is solved there, how often layers run, how zeros are shared, and kills."""

import copy
import shutil
import time

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.search.allocation import equal_marginal_cost_sparsities, owl_sparsities
from effc.compiler.transforms.search.layerwise import Grams, Layerwise, Norms, stages
from effc.compiler.transforms.search.masks import keep_mask
from effc.compiler.transforms.search.sparsity import chosen_parts
from effc.compiler.transforms.search.updates import solve_admm, solve_sparsegpt
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests import tiny
from tests.killing import kill_often
from tests.passes.test_sparsify import run
from tests.worlds import refused


def problem(n, k, seed, dead=()):
    """A weight, inputs that depend on each other, and the sums over them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    x = torch.randn(4 * k, k, generator=generator) @ torch.randn(k, k, generator=generator)
    x[:, list(dead)] = 0
    return weight, x, x.T @ x


def naive_sparsegpt(weight, gram, share, pattern, damping=0.01, block=128):
    """One weight of one row after another, by the inverse over the columns that are not settled yet."""
    w, h = weight.double().clone(), gram.double().clone()
    dead = h.diagonal() == 0
    w[:, dead], h[dead, dead] = 0, 1
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(len(h))]
    gone = torch.zeros_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        of = block if pattern == "any" else int(pattern[-1])
        if j % of == 0:
            worth = torch.stack([w[:, i] ** 2 / inverses[i][0, 0] for i in range(j, min(j + of, w.shape[1]))], 1)
            if pattern == "any":
                flat = worth.flatten().sort(stable=True).indices[: int(share * worth.numel())]
                gone[:, j : j + of] = (
                    torch.zeros(worth.numel(), dtype=torch.bool).index_fill(0, flat, True).view_as(worth)
                )
            else:
                gone[:, j : j + of].scatter_(1, worth.topk(of // 2, dim=1, largest=False).indices, True)
        for row in gone[:, j].nonzero()[:, 0]:
            w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][:, 0]
            w[row, j] = 0
    return w, gone


@pytest.mark.parametrize(
    ("k", "pattern", "dead"), [(24, "any", ()), (150, "any", (3, 140)), (24, "2:4", (5,)), (136, "4:8", ())]
)
def test_sparsegpt_settles_weights_as_a_naive_one_does(k, pattern, dead):
    weight, _, gram = problem(6, k, seed=k, dead=dead)
    found = solve_sparsegpt(weight, gram, 0.5, pattern)
    expected, gone = naive_sparsegpt(weight, gram, 0.5, pattern)
    assert torch.equal(found == 0, (expected == 0) | gone)
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3)  # float32 sums over 4 k inputs
    assert not found[:, list(dead)].any()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("pattern", ["any", "2:4", "4:8"])
def test_the_more_weights_move_the_less_of_the_outputs_is_lost(seed, pattern):
    weight, x, gram = problem(32, 64, seed)
    keep = keep_mask(weight.abs() * gram.diagonal().sqrt(), 0.5, pattern, "row")
    found = [torch.where(keep, weight, 0.0), *(f(weight, gram, 0.5, pattern) for f in (solve_sparsegpt, solve_admm))]
    for w in found:
        assert int((w == 0).sum()) == weight.numel() // 2
        assert not torch.signbit(w[w == 0]).any()
        assert pattern == "any" or ((w == 0).view(-1, int(pattern[-1])).sum(1) == int(pattern[0])).all()
    lost = [float(((w - weight) @ x.T).square().sum()) for w in found]
    assert lost == sorted(lost, reverse=True)


def test_admm_ends_near_the_best_weights_for_its_zeros():
    weight, x, gram = problem(8, 48, seed=4)
    found = solve_admm(weight, gram, 0.5, "any", damping_share=1e-6)
    best = torch.zeros_like(weight, dtype=torch.float64)
    for row, keep in enumerate(found != 0):
        inner, given_ = gram.double()[keep][:, keep], (gram.double() @ weight[row].double())[keep]
        best[row, keep] = torch.linalg.solve(inner, given_)

    def lost(w):
        return float(((w.double() - weight.double()) @ x.double().T).square().sum())

    assert lost(found) <= 1.05 * lost(best)


def test_grams_and_norms_are_those_of_whole_forwards():
    model = tiny.model("llama")
    program, rows = capture(model), torch.randint(3, 128, (20, 12), generator=torch.Generator().manual_seed(1))
    walk, inputs = Layerwise(program, rows), {}
    hooks = [
        m.register_forward_pre_hook(lambda m, x, p=path: inputs.setdefault(p, []).append(x[0]))
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        model(rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    for stage in stages(program, chosen_parts(skeleton_of(program), None)):
        grams, norms = Grams(), Norms()
        walk.run_and_observe_inputs(stage, grams.accumulate)
        walk.run_and_observe_inputs(stage, norms.accumulate)
        walk.mark_changed(stage)
        assert len(grams.sums) == 4  # q, k and v are given the same, and gate and up
        for path in stage.modules:
            x = torch.cat(inputs[path]).flatten(0, 1)
            assert torch.allclose(grams.finite_gram_or_none(path), x.T @ x, rtol=1e-3, atol=1e-3)
            assert torch.allclose(torch.tensor(norms.input_norms_or_empty(path)), x.norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("word", ["wanda", "sparsegpt"])
def test_every_layer_runs_twice_and_not_once_for_each_behind_it(tmp_path, word):
    model, calls = tiny.model("llama", num_hidden_layers=6), {}
    rows = torch.randint(3, 128, (96, 12), generator=torch.Generator().manual_seed(1))
    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(
            lambda m, args, out, i=i: calls.update({i: calls.get(i, 0) + len(args[0])})
        )
    run(tmp_path, model, word, rows)
    # Twice over the rows, the last once; the rest is capturing, and trying with one batch of 16 whether layers can be entered.
    assert all(96 <= count < 3 * 96 for count in calls.values()), calls


@pytest.mark.parametrize("word", ["wanda", "sparsegpt", "admm"])
@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_comes_to_the_same_bits(tmp_path, word):
    model, again = tiny.model("llama"), tmp_path / "again"
    (tmp_path / "whole").mkdir()
    started = time.monotonic()
    whole, _ = run(tmp_path / "whole", model, word, allocation="searched")
    span = time.monotonic() - started
    again.mkdir()
    kill_often(
        lambda: run(again, model, word, allocation="searched"), lambda: shutil.rmtree(again / "work"), span, seed=3
    )
    found, _ = run(again, model, word, allocation="searched")
    assert all(torch.equal(p, found.model.get_parameter(n)) for n, p in whole.model.named_parameters())


# -- how zeros are shared ------------------------------------------------------------------------------------


def test_owl_gives_the_published_shares():
    """As its code has it: ratios scaled to twice lambda, around the share that is kept."""
    ratios = {"a": 0.05, "b": 0.02, "c": 0.04}
    lamda, keep = 0.08, 0.4
    values = torch.tensor(list(ratios.values()), dtype=torch.float64)
    values = (values - values.min()) * (1 / (values.max() - values.min()) * lamda * 2)
    published = 1 - (values - values.mean() + keep)
    found = owl_sparsities(ratios, dict.fromkeys(ratios, 100), 1 - keep)
    assert torch.allclose(torch.tensor([found[unit] for unit in ratios], dtype=torch.float64), published, atol=1e-6)


@given(
    st.lists(st.tuples(st.floats(1e-6, 1), st.floats(1.1, 50), st.integers(1, 1000)), min_size=1, max_size=8),
    st.floats(0.2, 0.8),
)
def test_searched_shares_have_the_mean_that_was_asked_and_the_dearer_layer_keeps_more(layers, share):
    costs = {str(i): ((share - 0.1, cost), (share + 0.1, cost * rise)) for i, (cost, rise, _) in enumerate(layers)}
    weights = {str(i): size for i, (_, _, size) in enumerate(layers)}
    found = equal_marginal_cost_sparsities(costs, weights, share)
    mean = sum(found[u] * weights[u] for u in found) / sum(weights.values())
    assert mean == pytest.approx(share, abs=1e-6)
    assert all(share - 0.2 <= s <= share + 0.2 for s in found.values())
    alike = equal_marginal_cost_sparsities(
        {"cheap": ((share - 0.1, 0.01), (share + 0.1, 0.1)), "dear": ((share - 0.1, 0.02), (share + 0.1, 0.2))},
        {"cheap": 1, "dear": 1},
        share,
    )
    assert alike["cheap"] > alike["dear"]


@pytest.mark.parametrize("word", ["wanda", "sparsegpt", "admm"])
@pytest.mark.parametrize("how", ["owl", "searched"])
def test_layers_take_uneven_shares_that_make_the_whole_one(tmp_path, word, how):
    _, note = run(tmp_path, tiny.model("llama"), word, allocation=how)
    each = {path.split(".")[2]: share for path, share in note["zeros"].items() if "q_proj" in path}
    assert len(set(each.values())) > 1
    assert abs(note["sparsity"] - 0.5) < 0.01


def test_probes_leave_the_model_as_it_was(tmp_path):
    from effc.compiler.transforms.search.allocation import allocate_sparsity_by_unit
    from effc.compiler.transforms.search.sparsity import weight_count_by_path

    from tests.recipes_in_memory import context_of, recipe_of

    model = tiny.model("gpt2")
    program, before = capture(model), copy.deepcopy(model.state_dict())
    chosen = chosen_parts(skeleton_of(program), None)
    ctx = context_of(tmp_path, model, recipe_of([]))
    spread = allocate_sparsity_by_unit(
        program,
        stages(program, chosen),
        torch.randint(3, 128, (4, 12)),
        0.5,
        "searched",
        weight_count_by_path(chosen),
        ctx,
    )
    assert len(spread) == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_pattern_leaves_no_shares_to_decide(tmp_path, pattern):
    found = refused(lambda: run(tmp_path, tiny.model("llama"), "wanda", pattern=pattern, allocation="owl")).diagnostics[
        0
    ]
    assert found.slug == "unfit-pattern" and "allocation" in found.help
