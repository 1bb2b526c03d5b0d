"""Sentences of the command line name what there is, once, and a remedy that helps."""



RECIPE = (
    'effspec 1\nmodel m = zoo("tiny-llama")\npipeline p(m) {{ s = prune.blocks(remove: {}) }}\nemit p {{ hf("x") }}\n'
)


def test_a_link_that_leads_nowhere_is_no_suggestion_for_itself(effc, tmp_path):
    (tmp_path / "small.effspec").symlink_to("/nowhere")
    assert "did you mean" not in effc("check", "small.effspec").err
    (tmp_path / "smaller.effspec").write_text(RECIPE.format(1))
    assert "did you mean `smaller.effspec`?" in effc("check", "small.effspec").err
