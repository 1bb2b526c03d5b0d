"""How many tokens a search is to score by: what is asked for before anything is loaded."""

import json

import pytest
import transformers
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

RECIPE = """effspec 1
model base = config("./config.json")
data rows = synthetic(count: {count}, length: 256, seed: 1)
pipeline small(base) {{ slim = {step} }}
emit small {{ hf("small") }}
"""
SPLIT = "split: {blocks: 44, channels: 52, heads: 4}, search: exact"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Plans a step on a model of 103 M parameters without weights, of which 10 % ask for about 500 tokens."""
    folder = tmp_path_factory.mktemp("few")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=16
    )
    body = {**json.loads(config.to_json_string()), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(body))

    def plan(count, step):
        (folder / "r.effspec").write_text(RECIPE.format(count=count, step=step))
        (found,) = api.plan(folder / "r.effspec", cache_dir=folder / "cache", threads=1)
        return found

    return plan


@pytest.mark.slow
def test_a_search_that_is_to_remove_much_asks_for_tokens_to_choose_by(planned):
    with pytest.raises(
        Reject, match=r"too-few-rows: perplexity\(rows\) reads 256 tokens, too few to choose"
    ) as refused:
        planned(1, "prune.multi(remove: 10% of params, score: perplexity(rows))")
    assert "give it 507 or more" in refused.value.diagnostics[0].help
    assert planned(2, "prune.multi(remove: 10% of params, score: perplexity(rows))").stages


def test_less_that_goes_asks_for_less(planned):
    assert planned(1, "prune.multi(remove: 2% of params, score: perplexity(rows))").stages


@pytest.mark.parametrize(
    "step",
    [
        f"prune.multi(remove: 10% of params, score: perplexity(rows), {SPLIT})",
        "prune.blocks(remove: 1, score: perplexity(rows))",
    ],
)
def test_the_published_search_and_single_cuts_take_any_rows(planned, step):
    assert planned(1, step).stages
