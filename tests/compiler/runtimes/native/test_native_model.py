"""A native model's calls: those of transformers' models, with the same results. The engine is the naive one here."""

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.model import NativeModel
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.runtimes.native.sampling import Chooser, Sampling
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation import logits_process as published

from tests import tiny
from tests.compiler.runtimes.native.naive import Naive
from tests.compiler.runtimes.native.test_plans import halved, rows_of

torch.set_num_threads(1)
ATOL = 2e-4


@pytest.fixture(scope="module")
def original():
    return halved(tiny.model("llama", max_position_embeddings=24))


@pytest.fixture(scope="module")
def native(original):
    plan = Reader(capture(original), "bf16").build_plan()
    weights = {name: entry.make() for name, entry in plan.used().items()}
    body = plan.to_json()
    return NativeModel(Naive(body, weights), body, weights, {}, sequences=3)


@pytest.fixture
def batch():
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def test_a_forward_gives_the_logits_of_a_left_padded_batch(original, native, batch):
    ids, mask = batch
    found = native(input_ids=ids, attention_mask=mask)
    assert torch.allclose(found.logits * mask[..., None], rows_of(original, ids, mask) * mask[..., None], atol=ATOL)
    assert torch.equal(native(ids, mask, logits_to_keep=1).logits, found.logits[:, -1:])


def test_a_batch_of_more_rows_than_sequences_is_computed_in_parts(original, native):
    ids = torch.randint(3, 128, (5, 6), generator=torch.Generator().manual_seed(6))
    assert torch.allclose(native(ids).logits, rows_of(original, ids, torch.ones_like(ids)), atol=ATOL)


def test_a_cache_goes_on_where_it_was_and_gives_its_sequences_back(original, native, batch):
    ids, _ = batch
    first = native(ids[:, :5], use_cache=True)
    second = native(ids[:, 5:], cache=first.cache)
    both = torch.cat([first.logits, second.logits], 1)
    assert torch.allclose(both, rows_of(original, ids, torch.ones_like(ids)), atol=ATOL)
    assert second.cache.get_seq_length() == 9 and native.spare == 1
    del first, second
    assert native.spare == 3


@pytest.mark.parametrize("more", [{}, {"min_new_tokens": 12}, {"repetition_penalty": 1.3}])
def test_greedy_generation_gives_what_transformers_generates(original, native, batch, more):
    ids, mask = batch
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": [2, 7, 90], **more}
    wanted = original.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(native.generate(input_ids=ids, attention_mask=mask, **settings), wanted)
    config = GenerationConfig(return_dict_in_generate=True, output_logits=True, **settings)
    found = native.generate(ids, mask, generation_config=config)
    assert torch.equal(found.sequences, wanted) and len(found.logits) == wanted.shape[1] - ids.shape[1]


def test_a_token_beyond_the_vocabulary_ends_nothing(native, batch):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = native.generate(batch[0], eos_token_id=[2], **settings)
    assert torch.equal(native.generate(batch[0], eos_token_id=[2, 10**9], **settings), wanted)


def test_a_streamer_hears_the_prompt_and_then_every_token(native, batch):
    class Streamer:
        heard, ended = [], False

        def put(self, value):
            self.heard.append(value)

        def end(self):
            self.ended = True

    streamer = Streamer()
    made = native.generate(batch[0][:1], max_new_tokens=5, streamer=streamer)
    assert streamer.ended and torch.equal(torch.cat([streamer.heard[0][0], *streamer.heard[1:]]), made[0])


def test_draws_repeat_under_a_seed_and_follow_torch_without_one(native, batch):
    def draw(**more):
        return native.generate(batch[0], max_new_tokens=6, do_sample=True, temperature=2.0, **more)

    assert torch.equal(draw(seed=3), draw(seed=3)) and not torch.equal(draw(seed=3), draw(seed=4))
    torch.manual_seed(1)
    first = draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.floats(0.2, 3), k=st.integers(0, 12), p=st.floats(0.05, 1))
def test_what_can_be_drawn_is_what_transformers_processors_leave(seed, temperature, k, p):
    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed)) * 3
    wanted = published.TemperatureLogitsWarper(temperature)(None, logits)
    if k:
        wanted = published.TopKLogitsWarper(k)(None, wanted)
    wanted = published.TopPLogitsWarper(p)(None, wanted)
    found = Chooser(Sampling(do_sample=True, temperature=temperature, top_k=k, top_p=p)).probabilities(logits)
    assert torch.allclose(found, wanted.softmax(-1), atol=1e-6)


class Letters:
    """Token 3 is "a", 4 is "b", ..."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(94 + i) for i in ids)


def test_a_stop_string_ends_a_row_where_it_is_complete(native, batch):
    ids = batch[0][:1]
    plain = native.generate(ids, max_new_tokens=12)[0, 9:]
    stop = Letters().decode(plain[2:4].tolist())
    made = native.generate(ids, max_new_tokens=12, stop_strings=[stop], tokenizer=Letters())[0, 9:]
    text = Letters().decode(made.tolist())
    assert text.endswith(stop) and stop not in text[:-1] and torch.equal(made, plain[: len(made)])


def test_a_sequence_ends_at_the_models_context_and_past_it_is_an_error(native):
    ids = torch.full((1, 20), 5)
    assert native.generate(ids, max_new_tokens=50).shape == (1, 25)  # 24 positions, and what the last predicts
    with pytest.raises(Reject, match="25 tokens is longer than the model's context of 24"):
        native(torch.full((1, 25), 5))
    assert native.spare == 3


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 0.0, "do_sample": True}, "temperature is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop_strings": "a"}, "there is no tokenizer"),
    ],
)
def test_settings_that_mean_nothing_are_refused(native, settings, said):
    with pytest.raises(Reject, match=said):
        native.generate(torch.tensor([[4, 5]]), **settings)


def test_too_many_open_sequences_and_unknown_tokens_are_refused(native):
    kept = [native(torch.tensor([[4]]), use_cache=True) for _ in range(3)]
    with pytest.raises(Reject, match="1 more sequences are asked for, and 0 are free"):
        native.generate(torch.tensor([[4]]))
    del kept
    with pytest.raises(Reject, match="outside of the 128"):
        native(torch.tensor([[128]]))
