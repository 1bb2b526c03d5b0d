"""Models that the compiled engine runs: torch's logits over a prompt and many steps, alone and in batches.

Linear layers read activations as bfloat16 and the cache holds keys and values so: 2**-9 each, over three layers. Where two
experts are nearly equal to a router, that decides which of them is asked, so experts are alike in these models, and in
those where they are not most tokens are compared.
"""

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.model import DecoderModel
from effc.compiler.runtimes.native.reader import Reader
from effc.kernels.engine import Engine

from tests import tiny
from tests.compiler.runtimes.native.test_plans import MIXTURES, NATIVE, STATEFUL, WRITTEN, halved, made, rows_of

torch.set_num_threads(1)
SHARE = 2**-4  # of the largest logit
STEPS = 64


def native_of(model, weights="bf16", max_sequences=3, threads=1):
    plan = Reader(capture(model), weights).build_plan()
    tensors = {name: entry.make() for name, entry in plan.live_weight_entries().items()}
    body = plan.to_json()
    return DecoderModel(
        Engine(body, tensors, threads=threads, max_sequences=max_sequences), body, tensors, {}, max_sequences
    )


def assert_near(found, wanted, share=SHARE):
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= share * float(wanted.abs().max())


def alike(model):
    """Experts that differ by a twentieth of what they are."""
    layers = (m for m in model.modules() if any(p.dim() == 3 and p.shape[1] > 1 for p in m.parameters(recurse=False)))
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            middle = parameter.data.mean(0, keepdim=True)
            parameter.data = (middle + (parameter.data - middle) / 20).bfloat16().float()
    return model


@pytest.fixture(scope="module", params=(*NATIVE, *STATEFUL, *WRITTEN, *MIXTURES))
def pair(request):
    model = alike(made(request.param))
    return model, native_of(model)


def test_a_prompt_and_64_steps_give_the_models_logits(pair):
    model, native = pair
    ids = torch.randint(3, 128, (1, 20 + STEPS), generator=torch.Generator().manual_seed(3))
    wanted = rows_of(model, ids, torch.ones_like(ids))
    output = native(ids[:, :20], use_cache=True)
    assert_near(output.logits, wanted[:, :20])
    for at in range(20, 20 + STEPS):
        output = native(ids[:, at : at + 1], cache=output.cache)
        assert_near(output.logits, wanted[:, at : at + 1])


def test_a_prompt_of_which_only_the_last_token_is_wanted_gives_the_models_choice(pair):
    model, native = pair
    ids = torch.randint(3, 128, (1, 23), generator=torch.Generator().manual_seed(5))  # nothing of it is cached yet
    made = native.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    assert_near(made.logits[0], rows_of(model, ids, torch.ones_like(ids))[:, -1])


def test_rows_of_different_lengths_are_one_batch(pair):
    model, native = pair
    ids = torch.randint(3, 128, (3, 17), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :6], mask[2, :15] = 0, 0
    wanted = rows_of(model, ids, mask)
    assert_near(native(ids, mask).logits * mask[..., None], wanted * mask[..., None])
    made = native.generate(ids, attention_mask=mask, max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
    longer = torch.cat([mask, torch.ones(3, 6, dtype=torch.int64)], 1)
    again = rows_of(model, made.sequences, longer)
    assert_near(torch.stack(made.logits, 1), again[:, 16:-1])


@pytest.mark.parametrize("name", MIXTURES)
def test_most_tokens_meet_the_very_experts_of_the_model(name):
    model = made(name)
    ids = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(6))
    found, wanted = native_of(model)(ids).logits[0], rows_of(model, ids, torch.ones_like(ids))[0]
    near = (found - wanted).abs().amax(1) <= SHARE * wanted.abs().max()
    assert near.float().mean() >= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_experts_of_few_bits_stay_near_what_they_round(weights):
    model = alike(made("qwen3_moe"))
    ids = torch.randint(3, 128, (1, 30), generator=torch.Generator().manual_seed(5))
    share = 2**-3 if weights == "int8" else 2**-1
    assert_near(native_of(model, weights)(ids).logits, rows_of(model, ids, torch.ones_like(ids)), share)


def test_int8_weights_stay_near_what_they_round():
    model = halved(tiny.model("llama"))
    ids = torch.randint(3, 128, (1, 30), generator=torch.Generator().manual_seed(5))
    assert_near(native_of(model, "int8")(ids).logits, rows_of(model, ids, torch.ones_like(ids)), 2**-3)


def test_a_context_is_filled_to_its_last_position():
    model = halved(tiny.model("gpt2", n_positions=48))
    native = native_of(model)
    ids = torch.randint(3, 128, (1, 48), generator=torch.Generator().manual_seed(6))
    assert_near(native(ids).logits, rows_of(model, ids, torch.ones_like(ids)))
