"""Modules that a model does not run without are left as they are, with the reason, and the pass goes on."""

import pytest
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.ir.capture.capture import capture
from effc.compiler.transforms.search.uniform_widths import split_cuttable_and_uncuttable

from tests.architectures import passes, table
from tests.grids import wide

NAMES = {  # what their forward writes down: the width of all heads, of a bias for each head
    "trocr": (
        "AutoModelForCausalLM",
        "trocr",
        {
            "vocab_size": 128,
            "d_model": 64,
            "decoder_layers": 3,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 96,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "cross_attention_hidden_size": 64,
        },
    ),
    "layoutlmv3": (
        "AutoModelForSequenceClassification",
        "layoutlmv3",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "pad_token_id": 0,
            "visual_embed": False,
            "coordinate_size": 8,
            "shape_size": 16,
            "max_2d_position_embeddings": 64,
        },
    ),
    "pvt_v2": (
        "AutoModelForImageClassification",
        "pvt_v2",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 64, 64],
            "num_attention_heads": [2, 2, 4, 4],
            "depths": [1, 1, 1, 1],
            "mlp_ratios": [2, 2, 2, 2],
            "num_labels": 5,
        },
    ),
}


@pytest.fixture
def models(monkeypatch):
    for name, row in NAMES.items():
        monkeypatch.setitem(table.MORE, name, row)


@pytest.mark.parametrize("name", wide(NAMES, {"trocr"}))
@pytest.mark.slow
def test_a_search_over_all_kinds_leaves_heads_that_can_not_go(tmp_path, models, name):
    program, _ = passes.pruned(name, "prune.multi", tmp_path)
    tried = [note["why"] for note in program.notes if "left" in note]
    known = [why for _, why in skeleton_of(program).facts["refused"] if "from outside of the layer" in why]
    assert (tried or known) and all("fails when it runs in" in why for why in tried)
    assert not any("heads" in note.get("kind", "") for note in program.notes if "cut" in note)
    assert [note for note in program.notes if "cut" in note]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_where_no_head_can_go_the_reason_is_said(tmp_path, models, name):
    cell = passes.pruned(name, "prune.heads", tmp_path)
    assert isinstance(cell, passes.Cell)
    found = "can be narrowed: " in cell.why and "fails when it runs in" in cell.why
    known = "none of which can be cut in this model: `" in cell.why
    assert found or (known and "from outside of the layer, has an entry for each of its heads" in cell.why)


def test_every_module_is_left_under_its_own_name(models):
    program = capture(table.model("trocr"))
    heads = [g for g in skeleton_of(program).groups if g.kind == "heads"]
    channels = [g for g in skeleton_of(program).groups if g.kind == "channels"]
    able, refused = split_cuttable_and_uncuttable(program, [(g, 1) for g in (*heads, *channels)])
    assert able == channels and [g for g, _ in refused] == heads
    assert all(g.site in why for g, why in refused)


def test_what_can_not_go_is_told_with_the_remedy_for_its_kind():
    from effc.compiler.transforms.editing.dry_run import dry_run_or_reject
    from effc.compiler.transforms.editing.rewrite import Rewriter
    from effc.dsl.syntax.diagnostics import Reject

    program = capture(table.model("llama"))
    last = program.model.config.num_hidden_layers
    with pytest.raises(Reject) as refused:
        dry_run_or_reject(
            program,
            "half of the experts",
            lambda trial: Rewriter(trial).narrow(f"model.layers.{last - 1}.mlp.up_proj.weight", 0, [0, 1]),
            remedy="make them narrower",
        )
    (found,) = refused.value.diagnostics
    assert found.help == "make them narrower" and "half of the experts can't be removed" in found.message
