"""sparsify.*: which weights become zero, on which modules, and what is refused."""

import copy

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.shape_change import describe_change
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers.linear import weight_of
from effc.compiler.transforms.search.masks import (
    keep_mask,
    kth_smallest_of_rows,
    magnitude,
    magnitude_sort_keys,
    masked_copy,
)
from effc.dsl.checker.values import DataRef, Ratio, Selector
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests import tiny
from tests.grids import wide
from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import refused

HALF = Ratio(0.5, "weights")
WORDS = ["magnitude", "wanda", "sparsegpt", "admm"]


def run(tmp_path, model, word, rows=None, **args):
    """The program after the pass, and its last note."""
    given_ = {"on": None, "pattern": "any", "sparsity": HALF, **args}
    if word == "magnitude":
        given_ |= {"each": given_.get("each", "module")}
    else:
        given_ |= {"data": DataRef("rows"), "allocation": given_.get("allocation", "uniform")}
        given_ |= {} if word == "wanda" else {"damping": 0.01}
    recipe = recipe_of([("step", f"sparsify.{word}", given_)])
    program, ctx = capture(copy.deepcopy(model)), context_of(tmp_path, model, recipe, rows)
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program, program.notes[-1]


def on(*globs: str) -> Selector:
    return Selector(tuple(("|", glob) for glob in globs))


def share(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
    each=st.sampled_from(["row", "module"]),
)
def test_the_least_scores_go_and_as_many_as_asked(rows, columns, share, seed, each):
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # with ties
    keep = keep_mask(score, share, "any", each)
    groups = zip(score, keep, strict=True) if each == "row" else [(score.flatten(), keep.flatten())]
    for values, kept in groups:
        assert int((~kept).sum()) == int(share * len(values))
        gone = values.sort(stable=True).indices[: int(share * len(values))]  # of equal ones the first
        assert not kept[gone].any()
        assert not kept.any() or kept.all() or values[~kept].max() <= values[kept].min()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("each", ["row", "module"])
def test_a_masked_weight_has_the_bits_that_sorting_and_choosing_give(dtype, each):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[3], weight[:, 5], weight[:20, :20] = 0.0, -0.0, 0.5  # ties, and zeros of both signs
    score = weight.abs() if dtype == torch.float64 else weight.abs().float()
    flat = score if each == "row" else score.reshape(1, -1)
    order = flat.argsort(dim=1, stable=True)[:, : int(0.6 * flat.shape[1])]
    keep = torch.ones_like(flat, dtype=torch.bool).scatter_(1, order, False).view(score.shape)
    assert torch.equal(keep_mask(magnitude(weight), 0.6, "any", each), keep)
    assert torch.equal(keep_mask(magnitude_sort_keys(weight), 0.6, "any", each), keep)
    expected = torch.where(keep, weight, 0.0)
    assert torch.equal(masked_copy(weight, keep).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("place", [1, 2, 70_000, 1 << 20, (1 << 20) + 12])
@pytest.mark.parametrize("kind", ["normal", "few", "rising", "every other", "bits"])
def test_the_threshold_of_a_long_row_is_that_of_its_order(kind, place):
    count = (1 << 20) + 12
    row = torch.randn(count, generator=torch.Generator().manual_seed(3)).abs()
    if kind == "few":
        row = (row * 2).round()
    elif kind == "rising":
        row = torch.arange(count).float()
    elif kind == "every other":  # a sample of every sixteenth sees none of the others
        row[::16] += 100
    elif kind == "bits":
        row = magnitude_sort_keys(row.bfloat16())
    assert float(kth_smallest_of_rows(row[None], place)) == float(row.sort().values[place - 1])


@given(rows=st.integers(1, 70), columns=st.integers(1, 30), seed=st.integers(0, 99))
def test_blocks_go_and_stay_whole(rows, columns, seed):
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    keep = keep_mask(score, 0.5, "blocks", "module")
    blocks = [b for band in keep.split(16) for b in band.split(2, dim=1)]
    assert all(b.all() or not b.any() for b in blocks)
    assert sum(not b.any() for b in blocks) == len(blocks) // 2


@given(
    rows=st.integers(1, 9), groups=st.integers(1, 9), seed=st.integers(0, 99), pattern=st.sampled_from(["2:4", "4:8"])
)
def test_of_every_group_of_neighbours_the_least_half_goes(rows, groups, seed, pattern):
    of = int(pattern[-1])
    score = torch.rand(rows, groups * of, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    keep = keep_mask(score, 0.5, pattern, "row")
    for values, kept in zip(score.view(-1, of).tolist(), keep.view(-1, of).tolist(), strict=True):
        order = sorted(range(of), key=lambda i: values[i])  # stable
        assert {i for i in range(of) if not kept[i]} == set(order[: of // 2])


@pytest.mark.parametrize("name", wide(["llama", "phi3", "gpt2", "mixtral", "mamba2"], {"gpt2", "mixtral"}))
@pytest.mark.parametrize("word", WORDS)
def test_linear_modules_inside_the_layers_are_half_zero_and_nothing_else_changes(tmp_path, name, word):
    model = tiny.model(name)
    program, note = run(tmp_path, model, word)
    changed = {n for n, p in program.model.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == {f"{path}.weight" for path in note["zeros"]}
    assert all(abs(share(program.model.get_parameter(n)) - 0.5) < 0.02 for n in changed)  # narrow ones round
    assert abs(note["sparsity"] - 0.5) < 0.01
    assert not any("head" in n or "embed" in n for n in changed)


def test_magnitude_keeps_the_largest_weights_of_a_module(tmp_path):
    model = tiny.model("llama")
    program, note = run(tmp_path, model, "magnitude", on=on("*.up_proj"), sparsity=Ratio(0.8, "weights"))
    assert len(note["zeros"]) == 3
    before, after = model.model.layers[1].mlp.up_proj.weight, program.model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(after != 0, before.abs() > before.abs().flatten().kthvalue(round(0.8 * before.numel())).values)


def published(model, rows, share, pattern):
    """The published loop, less its bookkeeping: layer by layer, inputs from what was masked before."""
    for layer in model.model.layers:
        linears, inputs = [m for m in layer.modules() if isinstance(m, nn.Linear)], {}
        hooks = [m.register_forward_pre_hook(lambda m, x, i=inputs: i.setdefault(m, []).append(x[0])) for m in linears]
        model(rows, use_cache=False)
        for hook in hooks:
            hook.remove()
        for m in linears:
            norm = torch.cat(inputs[m]).flatten(0, 1).pow(2).sum(0).sqrt()
            metric, gone = m.weight.abs() * norm, torch.zeros_like(m.weight, dtype=torch.bool)
            if pattern == "any":
                gone.scatter_(1, metric.sort(dim=-1, stable=True)[1][:, : int(metric.shape[1] * share)], True)
            else:
                n, of = map(int, pattern.split(":"))
                for start in range(0, metric.shape[1], of):
                    few = torch.topk(metric[:, start : start + of], n, dim=1, largest=False)[1]
                    gone.scatter_(1, start + few, True)
            m.weight.data[gone] = 0


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_of_every_four_inputs_of_an_output_stay(tmp_path, name, word):
    program, note = run(tmp_path, tiny.model(name), word, pattern="2:4")
    for path in note["zeros"]:
        weight = weight_of(program.model.get_submodule(path))  # [out, in]
        assert ((weight == 0).reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize(("share", "pattern"), [(0.5, "any"), (0.3, "any"), (0.5, "2:4"), (0.5, "4:8")])
def test_wanda_makes_the_published_masks(tmp_path, share, pattern):
    model = tiny.model("llama")
    rows = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))
    program, _ = run(tmp_path, model, "wanda", rows, sparsity=Ratio(share, "weights"), pattern=pattern)
    with torch.no_grad():
        published(model, rows, share, pattern)
    for name, weight in model.named_parameters():
        assert torch.equal(weight != 0, program.model.get_parameter(name) != 0), name


def test_the_table_says_how_much_became_zero(tmp_path):
    skeleton = skeleton_of(capture(tiny.model("llama")))
    program, note = run(tmp_path, tiny.model("llama"), "magnitude", sparsity=Ratio(0.25, "weights"))
    assert describe_change(skeleton, skeleton_of(program), [note]).summary == "25.0 % zeros"


def test_wanda_goes_on_from_what_a_killed_run_had_measured(tmp_path):
    model = tiny.model("llama")
    first, _ = run(tmp_path, model, "wanda")
    lines = (tmp_path / "work/norms.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    (tmp_path / "work/norms.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])  # cut in the third
    again, _ = run(tmp_path, model, "wanda")
    assert all(torch.equal(p, again.model.get_parameter(n)) for n, p in first.model.named_parameters())


@pytest.mark.heavy
def test_the_more_a_pass_does_the_less_half_of_the_weights_cost_on_what_it_has_seen(tmp_path):
    from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(zoo_folders_by_name()["tiny-llama"]).eval()
    rows = torch.randint(3, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rows = model.generate(rows[:, :4], do_sample=False, max_new_tokens=60, min_new_tokens=60)
        loss = [
            float(run(tmp_path / word, model, word, rows)[0].model(rows, labels=rows).loss)
            for word in WORDS
            if (tmp_path / word).mkdir() is None
        ]
    assert loss == sorted(loss, reverse=True)


def test_a_weight_that_is_shared_is_refused(tmp_path):
    model = tiny.model("llama", tie_word_embeddings=True)
    found = refused(lambda: run(tmp_path, model, "magnitude", on=on("lm_head"))).diagnostics[0]
    assert found.slug == "tied-weight" and "model.embed_tokens.weight" in found.message


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("word", WORDS)
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, word, bad):
    model = tiny.model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
    found = refused(lambda: run(tmp_path, model, word)).diagnostics[0]
    assert found.slug == "not-a-number"
    assert "model.layers.1.mlp.up_proj" in found.message or "model.layers.1.mlp.down_proj" in found.message


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    ("args", "message", "help_"),
    [
        (
            {"pattern": "2:4", "sparsity": Ratio(0.6, "weights")},
            "makes 50% of the weights zero, and 60% are asked for",
            "`sparsity: 50% of weights`",
        ),
        (
            {"pattern": "4:8"},
            "model.layers.0.mlp.down_proj has 90 inputs, which groups of 8 don't divide, and 2 more",
            '"model.layers.*" - "*.down_proj"',
        ),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused_before_weights_are_read(tmp_path, word, args, message, help_):
    model = tiny.model("llama", intermediate_size=90)
    found = refused(lambda: run(tmp_path, model, word, **args)).diagnostics[0]
    assert found.slug == "unfit-pattern" and message in found.message and help_ in found.help
    args = {"pattern": "any", "sparsity": HALF, "on": None, **args}
    args |= {"each": "module"} if word == "magnitude" else {"data": DataRef("rows"), "allocation": "uniform"}
    args |= {"damping": 0.01} if word in ("sparsegpt", "admm") else {}
    recipe = recipe_of([("step", f"sparsify.{word}", args)])
    step = context_of(tmp_path, model, recipe).registry.make("pass", recipe.pipelines["lean"].steps[0].call)
    assert message in refused(lambda: step.forecast(skeleton_of(capture(model)))).diagnostics[0].message
