"""Parts of state-space mixers against oracles that know nothing of effc: zeros in stock weights, whole forwards."""

import copy
import json

import pytest
import torch
from effc.compiler.analysis.discovery.bypass import other_operand_of_join
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning.shrink import param_count, with_narrowed_group, without_scan
from effc.compiler.evaluation.equivalence import max_difference, record_logits_of_sample_calls
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.edits import Edits, replay_edits
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.editing.scan_removal import drop_scan
from effc.compiler.transforms.search.slices import with_narrowed_group_temporarily
from effc.compiler.transforms.search.widths import slice_group
from effc.dsl.checker.values import Ratio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests import mixers
from tests.grids import wide
from tests.mixers import cuts, loss
from tests.recipes_in_memory import SCORE, context_of, recipe_of
from tests.weights import load_weights, weights_of

ALL = (*mixers.MAMBA1, *mixers.MAMBA2)
IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))
MIN_SAMPLES = settings(max_examples=2, deadline=None, phases=[Phase.explicit, Phase.generate])
DEFAULTS = {
    "shed.ssm": {"score": SCORE, "on": None, "search": "exact"},
    "shed.blocks": {"score": SCORE, "on": None, "search": "exact"},
    "shed.heads": {"score": SCORE, "on": None, "search": "exact", "step": 1, "data": None},
    "shed.channels": {"score": SCORE, "on": None, "search": "exact", "align": 16, "repair": False, "data": None},
    "shed.state": {"score": SCORE, "on": None, "search": "exact", "step": 4},
}


def shed(tmp_path, model, word, **args):
    """The program of a copy of the model after one pass."""
    recipe = recipe_of([("step", word, {**DEFAULTS[word], **args})])
    ctx = context_of(tmp_path, model, recipe)
    program = capture(copy.deepcopy(model))
    ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call).run(program, ctx)
    return program


def reloaded(program, name, **changes):
    fresh = mixers.blank(name, **changes)
    replay_edits(fresh, Edits.from_json(json.loads(json.dumps(program.edits.to_json()))))
    load_weights(fresh, weights_of(program.model))
    return fresh


def assert_decodes(model):
    """Greedy tokens of a padded batch are the same with and without the cache."""
    ids, mask = IDS[:2, :6], torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    one, two = (
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(one, two)


# -- scans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_removed_scan_is_the_identity_and_takes_its_weights_along(name):
    model = mixers.model(name)
    program = capture(copy.deepcopy(model))
    scan = skeleton_of(program).scans[-1]
    foreseen = without_scan(skeleton_of(program), scan)
    with Rewriter(program) as rewrite:
        drop_scan(program, rewrite, scan)
    mixers.identity(model.get_submodule(scan.site))
    assert (
        max_difference(record_logits_of_sample_calls(model), record_logits_of_sample_calls(program.model)) < 2e-5
    )  # sums in another order
    kept = {n for n in program.model.state_dict() if n.startswith(f"{scan.site}.")}
    gone = ("A_log", "D", "dt_bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "b_layernorm.weight")
    assert kept and not kept & {f"{scan.site}.{n}" for n in gone}
    assert foreseen.shapes() == skeleton_of(program).shapes()
    assert (
        param_count(foreseen)
        == sum(p.numel() for p in program.model.parameters())
        < param_count(skeleton_of(capture(model)))
    )
    assert scan.site not in {s.site for s in skeleton_of(program).scans}
    assert_decodes(program.model)
    assert (
        max_difference(
            record_logits_of_sample_calls(program.model), record_logits_of_sample_calls(reloaded(program, name))
        )
        == 0.0
    )


def scan_oracle(model, count):
    """What goes, by trying every scan on a stock model of zeros and ones."""
    gone = []
    for _ in range(count):
        losses = {}
        for site in mixers.mixers(model):
            if site not in gone:
                trial = copy.deepcopy(model)
                for path in (*gone, site):
                    mixers.identity(trial.get_submodule(path))
                losses[site] = loss(trial)
        gone.append(min(losses, key=losses.get))
    return [f"{site} scan" for site in gone]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["mamba2", "mamba", "bamba"])
def test_scans_go_in_the_order_of_an_exhaustive_oracle(tmp_path, name, seed):
    more = {"attn_layer_indices": [2]} if name == "bamba" else {}
    model = mixers.model(name, seed, num_hidden_layers=4, **more)
    assert cuts(shed(tmp_path, model, "shed.ssm", remove=2)) == scan_oracle(model, 2)


# -- blocks --------------------------------------------------------------------------------------------------


def block_oracle(model, count):
    """What goes, by zeroing the output projection of every mixer."""
    gone = []
    for _ in range(count):
        losses = {}
        for site in mixers.mixers(model):
            if site not in gone:
                trial = copy.deepcopy(model)
                with torch.no_grad():
                    for path in (*gone, site):
                        trial.get_submodule(path).out_proj.weight.zero_()
                losses[site] = loss(trial)
        gone.append(min(losses, key=losses.get))
    return gone


@pytest.mark.slow
@pytest.mark.parametrize("seed", wide([0, 1], [0]))
@pytest.mark.parametrize("name", ["mamba2", "mamba", "bamba"])
def test_blocks_go_in_the_order_of_an_exhaustive_oracle(tmp_path, name, seed):
    more = {"attn_layer_indices": [2]} if name == "bamba" else {}
    model = mixers.model(name, seed, num_hidden_layers=4, **more)
    program = shed(tmp_path, model, "shed.blocks", remove=2)
    found = [cut.removesuffix(".mixer").removesuffix(".mamba") for cut in cuts(program)]
    expected = block_oracle(model, 2)
    assert found == [site.rpartition(".")[0] for site in expected]
    for site in expected:
        with torch.no_grad():
            model.get_submodule(site).out_proj.weight.zero_()
    assert max_difference(record_logits_of_sample_calls(model), record_logits_of_sample_calls(program.model)) < 1e-5
    assert_decodes(program.model)


def test_blocks_of_a_pure_model_go_as_layers_and_leave_a_stock_one(tmp_path):
    program = shed(tmp_path, mixers.model("mamba2"), "shed.blocks", remove=1)
    assert program.model.config.num_hidden_layers == 2 and not program.edits.graphs


@pytest.mark.parametrize("role", ["ssm", "attention"])
def test_of_parallel_branches_either_may_go(role):
    """Falcon-H1 adds attention and a mixer that read the same normed stream, as Hymba does."""
    model = mixers.model("falcon_h1")
    program = capture(copy.deepcopy(model))
    branches = [b for b in skeleton_of(program).branches if b.role == role]
    with Rewriter(program) as rewrite:
        for branch in branches[:2]:
            rewrite.drop_branch(
                branch.unit, branch.join, keep=other_operand_of_join(program.units[branch.unit].graph, branch)
            )
    for branch in branches[:2]:
        part = model.get_submodule(branch.site)
        with torch.no_grad():
            (part.out_proj if role == "ssm" else part.o_proj).weight.zero_()
        assert not any(n.startswith(f"{branch.site}.") for n in program.model.state_dict())
    assert max_difference(record_logits_of_sample_calls(model), record_logits_of_sample_calls(program.model)) < 1e-5
    assert_decodes(program.model)
    assert (
        max_difference(
            record_logits_of_sample_calls(program.model), record_logits_of_sample_calls(reloaded(program, "falcon_h1"))
        )
        == 0.0
    )


@pytest.mark.parametrize(
    "name", wide(["bamba", "jamba", "granitemoehybrid", "zamba2", "nemotron_h"], ["bamba", "zamba2"])
)
@pytest.mark.parametrize("role", ["ssm", "attention"])
def test_a_hybrid_decodes_rightly_when_the_first_branch_of_a_kind_is_gone(name, role):
    model = mixers.model(name)
    program = capture(copy.deepcopy(model))
    branch = next(b for b in skeleton_of(program).branches if b.role == role)
    before = set(program.model.state_dict())
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(
            branch.unit, branch.join, keep=other_operand_of_join(program.units[branch.unit].graph, branch)
        )
    gone = before - set(program.model.state_dict())
    assert gone and all(any(n.startswith(f"{part}.") for part in branch.parts) for n in gone)
    assert_decodes(program.model)
    assert (
        max_difference(
            record_logits_of_sample_calls(program.model), record_logits_of_sample_calls(reloaded(program, name))
        )
        == 0.0
    )


# -- heads, channels, states: masked = sliced ----------------------------------------------------------------


def chosen(data, group):
    """Some items of a group, the same number of every block, not all."""
    size = group.per_block or group.count
    count = data.draw(st.integers(1, size - 1))
    return {
        block * size + i
        for block in range(group.count // size)
        for i in data.draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count, unique=True))
    }


def assert_masked_is_sliced(data, name, kind, mask):
    """A model without some items is the stock one in which they are masked, in a trial and for good."""
    model = mixers.model(name, seed=data.draw(st.integers(0, 3)))
    program = capture(copy.deepcopy(model))
    groups = [g for g in skeleton_of(program).groups if g.kind == kind]
    group = data.draw(st.sampled_from(groups))
    dead = chosen(data, group)
    foreseen = with_narrowed_group(skeleton_of(program), group, group.count - len(dead))
    mask(model.get_submodule(group.site), sorted(dead))
    expected, untouched = record_logits_of_sample_calls(model), record_logits_of_sample_calls(program.model)
    with with_narrowed_group_temporarily(program, group, dead):
        tried = record_logits_of_sample_calls(program.model)
    assert max_difference(untouched, record_logits_of_sample_calls(program.model)) == 0.0
    with Rewriter(program) as rewrite:
        slice_group(program, rewrite, group, dead)
    assert max_difference(tried, record_logits_of_sample_calls(program.model)) == 0.0
    assert max_difference(expected, tried) < 1e-4  # 1e-4: float32 sums in another order
    assert foreseen.shapes() == skeleton_of(program).shapes()
    assert {g.site: g.count for g in foreseen.groups if g.kind == kind} == {
        g.site: g.count for g in skeleton_of(program).groups if g.kind == kind
    }
    assert {s.site: dict(s.cuts) for s in foreseen.scans} == {s.site: dict(s.cuts) for s in skeleton_of(program).scans}
    assert_decodes(program.model)
    assert max_difference(tried, record_logits_of_sample_calls(reloaded(program, name))) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", wide(mixers.MAMBA2, ["mamba2", "bamba"]))
@MIN_SAMPLES
@given(data=st.data())
def test_a_model_without_heads_is_the_one_that_masks_them(name, data):
    assert_masked_is_sliced(data, name, "ssm_heads", mixers.behead)


@pytest.mark.slow
@pytest.mark.parametrize("name", wide(mixers.MAMBA1, ["mamba"]))
@MIN_SAMPLES
@given(data=st.data())
def test_a_model_without_channels_is_the_one_that_reads_them_nowhere(name, data):
    assert_masked_is_sliced(data, name, "ssm_channels", mixers.ignore)


@pytest.mark.slow
@pytest.mark.parametrize("name", wide([*mixers.MAMBA1, *mixers.MAMBA2], ["mamba", "bamba"]))
@MIN_SAMPLES
@given(data=st.data())
def test_a_model_without_states_is_the_one_that_never_reads_them(name, data):
    assert_masked_is_sliced(data, name, "ssm_state", mixers.forget)


MAMBA2_HEADS = ("mamba2", "shed.heads", "ssm_heads", "heads")
MAMBA_STATE = ("mamba", "shed.state", "ssm_state", "states")


@pytest.mark.parametrize(
    ("name", "word", "kind", "of"),
    wide(
        [
            MAMBA2_HEADS,
            ("bamba", "shed.heads", "ssm_heads", "heads"),
            ("mamba", "shed.channels", "ssm_channels", "channels"),
            ("mamba2", "shed.state", "ssm_state", "states"),
            MAMBA_STATE,
            ("zamba2", "shed.heads", "ssm_heads", "heads"),
        ],
        [MAMBA2_HEADS, MAMBA_STATE],
    ),
)
@pytest.mark.parametrize("score", [None, SCORE], ids=["even", "scored"])
@pytest.mark.slow
def test_items_go_as_far_as_asked(tmp_path, name, word, kind, of, score):
    model = mixers.model(name)
    before = skeleton_of(capture(model))
    program = shed(tmp_path, model, word, keep=Ratio(0.5, of), score=score)
    counts = {g.site: g.count for g in skeleton_of(program).groups if g.kind == kind}
    assert sum(counts.values()) == sum(g.count for g in before.groups if g.kind == kind) // 2
    assert len(set(counts.values())) == 1 or score
    assert_decodes(program.model)


@pytest.mark.parametrize("name", wide(ALL, ["mamba2", "jamba", "zamba2"]))
def test_a_model_whose_scans_went_can_be_captured_and_shed_again(tmp_path, name):
    """Its graphs call leaf functions themselves; a second capture has to see those calls."""
    program = shed(tmp_path, mixers.model(name), "shed.ssm", remove=1)
    before, model = record_logits_of_sample_calls(program.model), program.model
    again = capture(model)
    assert len(skeleton_of(again).scans) == len(skeleton_of(program).scans)
    for unit in again.units.values():
        unit.install_graph_forward(model)
    assert max_difference(before, record_logits_of_sample_calls(model)) == 0.0


@pytest.mark.parametrize(
    ("name", "word", "step"),
    [("mamba", "shed.channels", {"align": 4}), ("mamba2", "shed.heads", {}), ("mamba2", "shed.state", {"step": 1})],
)
@pytest.mark.slow
def test_what_is_left_is_the_share_of_the_models_params_that_was_asked_for(tmp_path, name, word, step):
    model, step_of = mixers.model(name), next(iter(step.values()), 1)
    skeleton, whole = skeleton_of(capture(model)), model.num_parameters()
    groups = [g for g in skeleton.groups if g.kind == word.replace("shed.", "ssm_")]
    item = whole - param_count(with_narrowed_group(skeleton, groups[0], groups[0].count - 1))
    keep = 1 - 4.5 * item * step_of / whole
    program = shed(tmp_path, model, word, keep=Ratio(keep, "params"), search="racing", **step)
    assert program.model.num_parameters() == whole - 5 * item * step_of  # the fewest cuts that do it
