"""What contributes exactly zero goes, all else stays, and the outputs with it."""

import copy
import json

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.plan import plan_text
from effc.compiler.driver import api
from effc.compiler.evaluation.promise import OutputPromise
from effc.compiler.ir.capture.capture import capture
from effc.compiler.plugin.interfaces import Close
from effc.compiler.plugin.registry import Registry
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny
from tests.recipes_in_memory import context_of, recipe_of

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))
KINDS = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox")  # one of each layout of a layer
WITH_BIAS = ("gpt2", "opt", "gpt_neox")  # their output projections add one


def cleaned(tmp_path, model, align=1):
    """A copy of the model after the pass."""
    recipe = recipe_of([("step", "clean.dead", {"align": align})])
    ctx = context_of(tmp_path, model, recipe)
    program = capture(copy.deepcopy(model))
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def groups_of(model, kind):
    return [g for g in skeleton_of(capture(model)).groups if g.kind == kind]


@torch.no_grad()
def zero(model, members, items):
    for member in members:
        dead = [i for item in items for i in member.indices(item)]
        where = torch.tensor(dead, dtype=torch.int64)
        model.get_parameter(member.tensor).index_fill_(member.axis, where, 0.0)


@torch.no_grad()
def zero_module(model, *paths):
    for path in paths:
        for parameter in model.get_submodule(path).parameters():
            parameter.zero_()


def counts(program, kind):
    return [g.count for g in skeleton_of(program).groups if g.kind == kind]


def assert_same(program, model):
    assert torch.allclose(logits(program.model), logits(model), atol=1e-5)  # 1e-5: sums in another order


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow
def test_channels_that_nobody_reads_go(tmp_path, name):
    model = tiny.model(name)
    for items, group in zip(([0, 5, 95], [7], []), groups_of(model, "channels"), strict=True):
        zero(model, group.members[-group.readers :], items)
    program = cleaned(tmp_path, model)
    assert counts(program, "channels") == [93, 95, 96]
    assert_same(program, model)


@pytest.mark.parametrize("name", KINDS)
def test_channels_that_are_made_of_zeros_go(tmp_path, name):
    model = tiny.model(name)
    first, *_ = groups_of(model, "channels")
    zero(model, first.members[: -first.readers], [3, 4])
    program = cleaned(tmp_path, model)
    assert counts(program, "channels") == [94, 96, 96]
    assert program.notes == [{"site": first.site, "kind": "channels", "removed": [3, 4], "kept": 94}]
    assert_same(program, model)


def test_channels_made_of_zeros_stay_where_the_activation_makes_something_of_nothing(tmp_path):
    model = tiny.model("gpt2", activation_function="sigmoid")  # sigmoid(0) is 0.5
    group, *_ = groups_of(model, "channels")
    zero(model, group.members[: -group.readers], [3])
    with pytest.raises(Reject, match="nothing-dead"):
        cleaned(tmp_path, model)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("side", ["makers", "readers"])
def test_heads_with_their_keys_and_values_go(tmp_path, name, side):
    model = tiny.model(name)
    kind = "kv_heads" if groups_of(model, "kv_heads") else "heads"
    group = groups_of(model, kind)[1]
    zero(model, group.members[: -group.readers] if side == "makers" else group.members[-group.readers :], [1])
    program = cleaned(tmp_path, model)
    assert counts(program, "heads") == ([4, 3, 4] if kind == "heads" else [4, 2, 4])
    assert_same(program, model)


def test_every_kv_head_loses_the_same_number_of_query_heads(tmp_path):
    model = tiny.model("llama", num_attention_heads=8)  # 4 query heads per KV head
    group = groups_of(model, "heads")[0]
    zero(model, group.members[-group.readers :], [0, 1, 2, 6])
    program = cleaned(tmp_path, model)
    assert program.notes == [{"site": group.site, "kind": "heads", "removed": [0, 6], "kept": 6}]
    assert_same(program, model)


def test_a_query_head_of_zeros_stays_as_it_attends_evenly(tmp_path):
    model = tiny.model("llama")
    group = groups_of(model, "heads")[0]
    zero(model, group.members[: -group.readers], [0, 1, 2, 3])
    with pytest.raises(Reject, match="nothing-dead"):
        cleaned(tmp_path, model)


def test_widths_stay_multiples_of_align(tmp_path):
    model = tiny.model("llama")
    for count, group in zip((15, 16, 31), groups_of(model, "channels"), strict=True):
        zero(model, group.members[-group.readers :], range(count))
    assert counts(cleaned(tmp_path, model, align=16), "channels") == [96, 80, 80]


@pytest.mark.parametrize("name", KINDS)
def test_a_branch_without_an_output_projection_goes(tmp_path, name):
    model = tiny.model(name)
    branch = [b for b in skeleton_of(capture(model)).branches if b.role == "mlp"][1]
    last = next(g for g in groups_of(model, "channels") if g.site.startswith(branch.unit)).members[-1].tensor
    zero_module(model, last.rpartition(".")[0])
    program = cleaned(tmp_path, model)
    assert branch.site not in [b.site for b in skeleton_of(program).branches]
    assert len(skeleton_of(program).branches) == 5
    assert_same(program, model)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "bamba"])
def test_a_mixer_without_an_output_projection_goes(tmp_path, name):
    """In a layer's graph it is one node, for the state that it keeps."""
    model = tiny.model(name)
    mixer = next(path for path, m in model.named_modules() if "A_log" in m._parameters)
    zero_module(model, f"{mixer}.out_proj")
    program = cleaned(tmp_path, model)
    layers = [path for path, m in model.named_modules() if "A_log" in m._parameters]
    left = [path for path, m in program.model.named_modules() if "A_log" in m._parameters]
    assert len(left) == len(layers) - 1
    assert torch.equal(logits(model), logits(program.model))


@pytest.mark.parametrize("name", WITH_BIAS)
def test_a_branch_that_adds_a_bias_stays_with_one_channel(tmp_path, name):
    model = tiny.model(name)
    group = groups_of(model, "channels")[0]
    zero(model, group.members[-group.readers :], range(96))
    program = cleaned(tmp_path, model)
    assert counts(program, "channels") == [1, 96, 96] and len(skeleton_of(program).branches) == 6
    assert_same(program, model)


def test_a_layer_that_adds_nothing_goes_and_leaves_a_stock_config(tmp_path):
    model = tiny.model("llama")
    zero_module(model, "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")
    program = cleaned(tmp_path, model)
    assert program.model.config.num_hidden_layers == len(program.model.model.layers) == 2
    assert not any(unit.edited for unit in program.units.values())
    assert_same(program, model)
    made = [m.generate(IDS, max_new_tokens=6, do_sample=False) for m in (model, program.model)]
    assert torch.equal(*made)


def test_of_a_model_of_zeros_the_last_of_everything_stays(tmp_path):
    model = tiny.model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    program = cleaned(tmp_path, model)
    assert len(program.units) == 1 and len(skeleton_of(program).branches) == 1
    assert {g.count for g in skeleton_of(program).groups} == {1}
    assert_same(program, model)


# -- through the compiler ------------------------------------------------------------------------------------

PADDED = """effspec 1
model base = config("tiny.json", seed: 3)
data  rows = synthetic(4, length: 12, seed: 1)
pipeline lean(base) {
  slim = prune.blocks(remove: 1, score: perplexity(rows))
  thin = prune.channels(keep: 50% of channels, align: 16, score: perplexity(rows))
}
emit lean { hf("lean", form: both) }
"""
CLEANED = """effspec 1
model base = hf("./padded/lean/compat")
pipeline tidy(base) {
  bare = clean.dead()
}
emit tidy { hf("tidy", form: compact) }
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the config of a tiny Llama with random weights."""
    config = tiny.config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    return tmp_path


def compiled(folder, text, out):
    (folder / f"{out}.effspec").write_text(text)
    (result,) = api.compile(folder / f"{out}.effspec", folder / out, cache_dir=folder / "cache", threads=1)
    return result.artifacts[0].path


@pytest.mark.slow
def test_a_checkpoint_filled_up_with_zeros_gets_as_small_as_it_was(folder):
    small, tidy = compiled(folder, PADDED, "padded") / "compact", compiled(folder, CLEANED, "tidy")
    shapes = [{n: p.shape for n, p in api.load(path).named_parameters()} for path in (small, tidy)]
    assert shapes[0] == shapes[1]


def test_in_bfloat16_outputs_are_kept_within_its_rounding(tmp_path):
    model = tiny.model("llama").bfloat16()
    for group in groups_of(model, "channels"):
        zero(model, group.members[-group.readers :], range(0, 96, 3))
    before = OutputPromise.of(capture(model))
    program = cleaned(tmp_path, model)
    before.check(program, Close(atol=1e-4))
    with torch.no_grad():
        program.model.lm_head.weight.mul_(1.2)
    with pytest.raises(Reject, match="promise-broken"):
        before.check(program, Close(atol=1e-4))


ON_RANDOM = CLEANED.replace('hf("./padded/lean/compat")', 'config("tiny.json", seed: 0)')


@pytest.mark.slow
def test_a_model_without_zeros_is_told_to_leave_the_step_out(folder):
    with pytest.raises(Reject) as refused:
        compiled(folder, ON_RANDOM, "tidy")
    (diagnostic,) = refused.value.diagnostics
    assert (diagnostic.slug, diagnostic.exit, diagnostic.span.text) == ("nothing-dead", 3, "clean.dead()")
    assert diagnostic.help.startswith("leave the step out")


def test_a_plan_says_that_weights_decide_how_much_is_left(folder):
    step = "clean.dead()\n  thin = prune.channels(keep: 50% of channels, align: 16)"
    (folder / "r.effspec").write_text(ON_RANDOM.replace("clean.dead()", step))
    (plan,) = api.plan(folder / "r.effspec", cache_dir=folder / "cache")
    assert [stage.hedges for stage in plan.stages] == [("", "at most"), ("at most", "at most")]
    lines = plan_text(plan).splitlines()
    assert "     params    109.0 k -> at most 109.0 k  (known once it has run)" in lines
    assert "     params    at most 109.0 k -> at most 81.3 k  (-25.4 %)" in lines, lines
    (emission,) = (line for line in lines if line.startswith("  emit"))
    assert ", at most " in emission and emission.endswith(" on disk")


def test_counts_behind_it_are_not_checked_against_the_structure_before_it(folder):
    step = "clean.dead()\n  bald = prune.heads(keep: 75% of kv_heads)"  # 1.5 of 2
    recipe = folder / "r.effspec"
    recipe.write_text(ON_RANDOM.replace("clean.dead()", step))
    assert api.open_session(recipe, cache_dir=folder / "cache").check(resolve=True).diagnostics == ()
    recipe.write_text(ON_RANDOM.replace("clean.dead()", step.partition("bald = ")[2]))
    (found,) = api.open_session(recipe, cache_dir=folder / "cache").check(resolve=True).diagnostics
    assert found.slug == "illegal-head-count"


def test_the_example_of_its_page_is_a_recipe(folder):
    doc = Registry().vocabulary.word("pass", "clean.dead").doc
    step = next(line for line in doc.splitlines() if line.startswith("Example: ")).removeprefix("Example: ")
    recipe = folder / "r.effspec"
    recipe.write_text(ON_RANDOM.replace("tidy", "neat").replace("bare = clean.dead()", step))
    assert api.open_session(recipe, cache_dir=folder / "cache").check(resolve=True).diagnostics == ()
