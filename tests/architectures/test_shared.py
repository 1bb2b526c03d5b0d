"""Blocks that several layers share stay shared, whatever is cut."""

import pytest
import torch
from effc.compiler.analysis.discovery.bypass import other_operand_of_join
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.artifacts.compat import plan_padding_to_stock
from effc.compiler.evaluation import equivalence
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.editing.rewrite import Rewriter
from effc.compiler.transforms.search.widths import slice_groups

from tests.architectures import table
from tests.architectures.test_closure import SHARE, timeouts

torch.set_num_threads(1)


def without_branch(name: str, layer: int, role: str):
    program = capture(table.model(name))
    unit = list(program.units)[layer]
    branch = next(b for b in skeleton_of(program).branches if b.unit == unit and b.role == role)
    with Rewriter(program) as rewrite:
        rewrite.drop_branch(unit, branch.join, other_operand_of_join(program.units[unit].graph, branch))
    return program


@pytest.mark.slow
def test_a_dropped_branch_that_another_layer_still_runs_can_not_come_back_as_zeros():
    program = without_branch("zamba2", 2, "attention")
    assert "shared_transformer" in " ".join(plan_padding_to_stock(program).reasons)


def test_what_two_layers_share_is_cut_once_and_stays_shared():
    program = capture(table.model("zamba2"))
    groups = [g for g in skeleton_of(program).groups if g.members[0].tensor.startswith("model.layers.2.")]
    groups = [g for g in groups if not g.kind.startswith("ssm")]  # the mixer is not shared
    assert {g.kind for g in groups} == {"channels", "heads"}
    cuts = [(g, set(range(g.count // 2))) for g in groups if g.count > 1]
    silenced = table.model("zamba2")
    for group, items in cuts:
        timeouts(silenced, group, items)
    with Rewriter(program) as rewrite:
        slice_groups(program, rewrite, cuts)
    expected, found = (
        equivalence.record_logits_of_sample_calls(silenced),
        equivalence.record_logits_of_sample_calls(program.model),
    )
    assert equivalence.max_difference(expected, found) <= SHARE * max(float(x.abs().max()) for x in expected)
    layers = [program.model.model.layers[i].shared_transformer for i in (2, 5)]
    assert layers[0].self_attn.q_proj.weight is layers[1].self_attn.q_proj.weight
    assert layers[0].feed_forward.down_proj.weight is layers[1].feed_forward.down_proj.weight
