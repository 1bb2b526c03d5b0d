"""Architectures that a config of common names makes: none has a plan that is wrong, and none ends in a traceback."""

import pytest
import torch
import transformers
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.reader import Reader
from packaging.version import Version

from tests.compiler.runtimes.native.naive import Naive
from tests.compiler.runtimes.native.survey import made, verdict
from tests.compiler.runtimes.native.test_engine_models import alike, assert_near, native_of, rows_of

torch.set_num_threads(1)
ROUTED = ("llama4_text", "phimoe", "olmoe", "granitemoe", "glm4_moe", "afmoe", "ernie4_5_moe", "hunyuan_v1_moe")
DECIDED = ("dbrx", "kolibri1", "jetmoe")  # by a layer itself; by logits, weighed by their sigmoid; sorted by expert
INDEXED = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4")  # attention to keys that are chosen, or to all
LATENT = ("deepseek_v2", "deepseek_v3", "minicpm3")
WRITTEN = ("falcon", "ministral3")  # products of its own, queries that grow with the position
UNCACHED = ("openai-gpt", "roformer")  # the same of models without a cache
DELTA = ("qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "bailing_hybrid")  # gated delta rules
SHARED = ("gemma3n_text", "gemma4_text")  # layers that attend to another's keys and values
DECAYING = ("minimax",)  # linear attention
REPEATED = ("hrm_text",)  # layers that run several times in one forward
SCANNED = ("zamba",)  # a scan for each head
MASKED = ("xmod", "doge")  # by the languages of rows; by what keys gain
MODULE_ALIASES = ("recurrent_gemma", "rwkv")  # a convolution of torch, recurrences, numbers of the token before
LEAF_FUNCTIONS = ("apertus", "laguna", "gpt_neox_japanese")  # an activation, a gate, a bias of their own


@pytest.mark.parametrize(
    "name",
    (
        *ROUTED,
        *DECIDED,
        *INDEXED,
        *LATENT,
        *WRITTEN,
        *UNCACHED,
        *DELTA,
        *DECAYING,
        *REPEATED,
        *SCANNED,
        *MASKED,
        *SHARED,
        *MODULE_ALIASES,
        *LEAF_FUNCTIONS,
    ),
)
@pytest.mark.slow
def test_a_plan_computes_what_torch_does(name):
    assert verdict(made(name)) == ("ok", "")


@pytest.mark.slow
def test_experts_that_give_back_what_they_are_given_are_computed_by_experts_alone():
    """transformers 5.24 leaves them to the experts; from 5.25 on their layer adds them, which is refused by name."""
    result, reason = verdict(made("longcat_flash"))
    if Version(transformers.__version__) < Version("5.25"):
        assert (result, reason) == ("ok", "")
    else:
        assert result == "refused" and reason.endswith("experts are chosen in a way that the engine does not have")


def test_a_head_counts_where_a_model_has_no_base_of_its_own():
    assert Reader(capture(made("llama4_text")), "bf16").build_plan().output.predicts_next_tokens


def assert_decodes(native, ids, wanted):
    """Half of the rows at once, the other token by token."""
    output = native(ids[:, :20], use_cache=True)
    assert_near(output.logits, wanted[:, :20])
    for at in range(20, 40):
        output = native(ids[:, at : at + 1], cache=output.cache)
        assert_near(output.logits, wanted[:, at : at + 1])


DECODED = ("kimi_linear", "gemma3n_text", "openai-gpt", "recurrent_gemma", "rwkv", "hy_v4")


@pytest.mark.parametrize("name", [*DECODED, "kolibri1", "jetmoe", *DECAYING, *SCANNED, *MASKED])
def test_the_engine_decodes_what_the_graph_of_a_forward_says(name):
    model = alike(made(name))
    native, ids = native_of(model), torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(3))
    wanted = rows_of(model, ids, torch.ones_like(ids))
    assert_decodes(native, ids, wanted)


# Convolutions of convolutions; a model that asks what a mask holds.
@pytest.mark.parametrize("name, module", [("zaya", "conv_qk_depthwise"), ("xlm", "XLMModel")])
def test_what_has_no_step_is_refused_by_its_module(name, module):
    state, why = verdict(made(name))
    assert state == "refused" and module in why


def test_a_context_ends_where_a_module_no_longer_chooses_all_keys():
    model = made("deepseek_v32")
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 9
    plan = Reader(capture(model), "bf16").build_plan()
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(2))
    engine = Naive(plan.to_json(), {key: entry.make() for key, entry in plan.live_weight_entries().items()})
    found = engine.run(ids[0].tolist(), [0] * 9, [True] * 9)
    assert plan.context == 9
    with torch.no_grad():
        assert torch.allclose(found, model(ids).logits[0], atol=1e-3)


def test_keys_and_values_that_are_made_of_latents_are_what_the_engine_caches():
    model = alike(made("deepseek_v3"))
    native, ids = native_of(model), torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(3))
    wanted = rows_of(model, ids, torch.ones_like(ids))
    assert_decodes(native, ids, wanted)


def test_a_context_ends_where_a_layer_drops_the_keys_that_gain_least():
    model = made("doge")
    for module in model.modules():
        if hasattr(module, "keep_window_size"):
            module.keep_window_size = 30
    assert Reader(capture(model), "bf16").build_plan().context == 30


def test_copies_of_heads_are_kept_once():
    model = made("jetmoe")
    heads = model.config.num_key_value_heads
    assert model.config.num_experts_per_tok > 1  # each expert's queries meet the same keys
    assert {slot["kv_heads"] for slot in Reader(capture(model), "bf16").build_plan().slots} == {heads}


def test_a_past_that_fades_otherwise_than_the_rates_say_is_refused():
    model = made("minimax")
    model.model.layers[0].self_attn.slope_rate.mul_(2)
    state, why = verdict(model)
    assert state == "refused" and "MiniMaxLightningAttention" in why
