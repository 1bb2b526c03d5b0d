"""`effc new` writes recipes that can be planned: shares that can go, and no step for parts that all stay."""

import pytest
import torch

from tests.architectures import lot, table


def written(effc, folder, model):
    model.save_pretrained(folder / "model")
    run = effc("new", "model", "-o", "r.effspec")
    return run, (folder / "r.effspec").read_text() if run.code == 0 else ""


@pytest.mark.slow
def test_where_the_goal_is_out_of_reach_a_share_that_can_go_is_written_with_its_bound(effc, tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16384,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        tie_word_embeddings=True,
    )
    run, text = written(effc, tmp_path, transformers.LlamaForCausalLM(config))
    assert run.code == 0 and "remove: 5% of params" in text and "<= 0.953 * base" in text, run.err + text
    assert effc("plan", "r.effspec", "--no-progress").code == 0


@pytest.mark.slow
def test_parts_that_all_stay_are_told_before_anything_is_written(effc, tmp_path):
    run, _ = written(effc, tmp_path, table.model("rwkv"))
    assert run.code == 5 and "rwkv.blocks.0.attention stays: without what add adds" in run.err
    assert not list(tmp_path.glob("*.effspec"))


@pytest.mark.slow
def test_check_names_why_no_branch_can_go(effc, tmp_path):
    table.model("rwkv").save_pretrained(tmp_path / "model")
    recipe = 'effspec 1\nmodel base = hf("./model")\ndata rows = synthetic(count: 8, length: 16)\n'
    recipe += "pipeline small(base) { slim = prune.blocks(remove: 1, score: perplexity(rows)) }\n"
    (tmp_path / "r.effspec").write_text(recipe + 'emit small { hf("small") }\n')
    run = effc("check", "r.effspec", "--resolve")
    assert run.code == 3 and "error[nothing-to-select]" in run.err and "what stays reads what it computes" in run.err


@pytest.mark.slow
def test_a_recipe_for_a_norm_over_a_whole_picture_compiles_as_it_was_written(effc, tmp_path):
    torch.set_num_threads(1)
    run, text = written(effc, tmp_path, table.model("convnextv2"))
    assert run.code == 0 and "prune.multi" in text
    run = effc("compile", "r.effspec", "--no-progress")
    assert run.code == 0, run.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["metaclip_2", "voxtral"])
def test_a_recipe_for_a_model_of_images_or_sounds_and_text_is_planned_and_compiles(effc, tmp_path, kind):
    torch.set_num_threads(1)
    run, text = written(effc, tmp_path, lot.made(kind, lot.classes()[kind]))
    assert run.code == 0 and "prune.multi" in text, run.err
    assert effc("plan", "r.effspec", "--no-progress").code == 0
    run = effc("compile", "r.effspec", "--no-progress")
    assert run.code == 0, run.err
