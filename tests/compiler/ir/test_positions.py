"""How many tokens a row may have, and what is timed where that is few."""

import pytest
import torch
import transformers
from effc.compiler.driver.judging.comparison import default_speed_metric
from effc.compiler.evaluation.timing import WARMUP, make_decode_step
from effc.compiler.ir.slots import layer_index_lists, per_layer_values
from effc.compiler.models.checkpoints.origin import max_row_tokens
from effc.dsl.syntax.diagnostics import Reject

SIZES = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 12,
    "is_decoder": True,
}


def decoder(kind: str, **more) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    name = "BertLMHeadModel" if kind == "Bert" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize(
    "kind, more",
    [
        ("Bert", {}),
        ("Roberta", {"pad_token_id": 1}),
        ("Roberta", {"pad_token_id": 3}),
        ("Camembert", {"pad_token_id": 1}),
        ("XLMRoberta", {"pad_token_id": 1}),
        ("RobertaPreLayerNorm", {"pad_token_id": 1}),
    ],
)
def test_the_longest_row_is_the_longest_that_runs(kind, more):
    model = decoder(kind, **more)
    longest = max_row_tokens(model.config.to_dict())
    model(input_ids=torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 7))


@pytest.mark.parametrize("positions", [8, 12, 40, 64, 162, 163, 4096, None])
def test_what_every_table_times_fits_the_positions(positions):
    asked = default_speed_metric(positions)
    prompt, steps = asked.get("prompt", 128), asked.get("steps", 32)
    assert prompt >= 1 and steps >= 1
    assert positions is None or prompt + steps + WARMUP <= positions


def test_a_prompt_beyond_the_positions_is_refused_with_their_number():
    with pytest.raises(Reject, match="a prompt of 64 tokens is timed, and the model has 10 positions"):
        make_decode_step(decoder("Roberta", pad_token_id=1), 64)()


def test_configs_whose_layers_differ_are_read_without_asking_for_one_value():
    config = transformers.Gemma4TextConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    )
    assert list(per_layer_values(config, 4)) == ["layer_types"]
    assert layer_index_lists(config, 4) == {}
