"""Attention and state-space heads side by side in one layer, as in Hymba: either side may go."""

import copy
import json
import math

import pytest
import torch
from effc.compiler.analysis.discovery.bypass import other_operand_of_join
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.evaluation.equivalence import max_difference, record_logits_of_sample_calls
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.edits import Edits, replay_edits
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.search.savings import SavingsTable

from tests import hymba
from tests.architectures.table import randomized
from tests.weights import load_weights, weights_of

torch.set_num_threads(1)


def model(fused: bool) -> torch.nn.Module:
    return randomized(lambda: hymba.Hymba(fused))


def without(program, branch):
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(branch.unit, branch.join, other_operand_of_join(program.units[branch.unit].graph, branch))


def branches(program, role, unit="layers.1"):
    return [b for b in skeleton_of(program).branches if (b.unit, b.role) == (unit, role)]


@pytest.mark.parametrize("fused", [True, False], ids=["one projection", "two projections"])
def test_both_sides_are_branches(fused):
    program = capture(model(fused))
    assert [b.role for b in skeleton_of(program).branches] == 3 * ["attention", "ssm", "mlp"] or [
        b.role for b in skeleton_of(program).branches
    ] == 3 * ["ssm", "attention", "mlp"]
    parts = [part for b in skeleton_of(program).branches for part in b.parts]
    assert len(set(parts)) == len(parts), "what both sides need is neither's"
    assert len({b.site for b in skeleton_of(program).branches}) == 9


@pytest.mark.parametrize("role", ["attention", "ssm"])
@pytest.mark.parametrize("fused", [True, False], ids=["one projection", "two projections"])
def test_either_side_can_go_and_takes_its_weights_along(fused, role):
    original = model(fused)
    program = capture(copy.deepcopy(original))
    (branch,) = branches(program, role)
    without(program, branch)
    mixer, silenced = program.model.layers[1].mixer, copy.deepcopy(original)
    with torch.no_grad():
        getattr(silenced.layers[1].mixer, f"{role}_weight").zero_()
    assert max_difference(record_logits_of_sample_calls(silenced), record_logits_of_sample_calls(program.model)) < 1e-5
    left = mixer.attention_width if role == "ssm" else 2 * hymba.INNER + 2 * hymba.STATES + hymba.HEADS
    if fused:
        assert mixer.in_proj.weight.shape == (left, hymba.WIDTH) and mixer.in_proj.bias.shape == (left,)
        assert mixer.in_proj.out_features == left
    else:
        assert hasattr(mixer, "qkv_proj") is (role == "ssm") and hasattr(mixer, "ssm_proj") is (role == "attention")
    assert hasattr(mixer, "conv") is (role == "attention")
    fresh = hymba.Hymba(fused).eval()
    replay_edits(fresh, Edits.from_json(json.loads(json.dumps(program.edits.to_json()))))
    load_weights(fresh, weights_of(program.model))
    assert max_difference(record_logits_of_sample_calls(program.model), record_logits_of_sample_calls(fresh)) == 0.0


@pytest.mark.parametrize("first", ["attention", "ssm"])
def test_the_other_side_goes_with_the_whole_mixer(first):
    program, silenced = capture(model(True)), model(True)
    without(program, branches(program, first)[0])
    (other,) = [b for b in skeleton_of(program).branches if b.unit == "layers.1" and b.role in ("attention", "ssm")]
    assert any(part.endswith("out_proj") for part in other.parts)
    without(program, other)
    with torch.no_grad():
        silenced.layers[1].mixer.out_proj.weight.zero_()
        silenced.layers[1].mixer.out_proj.bias.zero_()
    assert max_difference(record_logits_of_sample_calls(silenced), record_logits_of_sample_calls(program.model)) < 1e-5
    assert not any(n.startswith("layers.1.mixer.") for n in program.model.state_dict())


def test_what_a_side_saves_is_counted_once():
    program = capture(model(False))
    savings_table = SavingsTable(skeleton_of(program))
    for branch in branches(program, "attention") + branches(program, "ssm"):
        sizes = [math.prod(s) for p in skeleton_of(program).parts if p.path in branch.parts for _, s in p.tensors]
        assert savings_table.branch_savings(branch.site, "params") == sum(sizes) > 0


def test_a_cut_leaves_a_modules_own_dict_of_tensors_alone():
    program = capture(model(True))
    narrowed = program.model.layers[1].mixer.in_proj
    narrowed.steps = {"ids": torch.arange(3), "cpu": torch.ones(2)}
    without(program, branches(program, "ssm")[0])
    assert list(narrowed.steps) == ["ids"]  # what is kept by device is computed again
