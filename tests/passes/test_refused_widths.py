"""Groups that a model does not run without stay, each with its reason, and the pass goes on with the others."""

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.search.savings import steps_per_cut
from effc.compiler.transforms.search.uniform_widths import split_cuttable_and_uncuttable

from tests.architectures import table
from tests.passes.test_clean import cleaned

torch.set_num_threads(1)


def test_a_model_that_runs_with_numbers_alone_tells_what_it_needs():
    """DBRX looks which experts were chosen, so nothing shows without weights: their width stands in its config."""
    program = capture(table.model("dbrx"))
    groups = skeleton_of(program).groups
    able, refused = split_cuttable_and_uncuttable(program, [(group, steps_per_cut(group, 1)) for group in groups])
    assert {g.kind for g in able} >= {"kv_heads"} and {g.kind for g, _ in refused} == {"channels"}
    why = refused[0][1]
    assert why.startswith(
        "DbrxForCausalLM fails when it runs in transformer.blocks.0.ffn.experts with fewer of them, at "
    )
    assert "Error" not in why


@pytest.mark.slow
def test_dead_heads_that_the_model_needs_stay_and_dead_channels_go(tmp_path):
    model = table.model("t5")
    with torch.no_grad():
        for block in (*model.encoder.block, *model.decoder.block):
            block.layer[-1].DenseReluDense.wi.weight[3] = 0
            block.layer[0].SelfAttention.o.weight[:, :16] = 0
            block.layer[0].SelfAttention.v.weight[:16] = 0
    before = sum(p.numel() for p in model.parameters())
    program = cleaned(tmp_path, model)
    assert sum(p.numel() for p in program.model.parameters()) < before
