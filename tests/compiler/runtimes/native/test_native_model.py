"""A native model's calls: those of transformers' models, with the same results. The engine is the naive one here."""

import pytest
import torch
from effc.compiler.apps.serving.chat import ChatSession
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.model import DecoderModel
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.syntax.diagnostics import Reject
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tests import tiny, worlds
from tests.compiler.runtimes.modes import MODES, seeded
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
    weights = {name: entry.make() for name, entry in plan.live_weight_entries().items()}
    body = plan.to_json()
    return DecoderModel(Naive(body, weights), body, weights, {}, max_sequences=3)


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
    assert second.cache.get_seq_length() == 9 and native.num_free_sequences == 1
    del first, second
    assert native.num_free_sequences == 3


@pytest.mark.parametrize("more", [{}, {"min_new_tokens": 12}, {"repetition_penalty": 1.3}])
def test_greedy_generation_gives_what_transformers_generates(original, native, batch, more):
    ids, mask = batch
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": [2, 7, 90], **more}
    wanted = original.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(native.generate(input_ids=ids, attention_mask=mask, **settings), wanted)
    config = GenerationConfig(return_dict_in_generate=True, output_logits=True, **settings)
    found = native.generate(ids, attention_mask=mask, generation_config=config)
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


# -- what transformers generates, by its own loops and by the engine's -----------------------------------------


@pytest.fixture(scope="module")
def roomy(original):
    """As `native`, with a sequence for each beam."""
    plan = Reader(capture(original), "bf16").build_plan()
    weights = {name: entry.make() for name, entry in plan.live_weight_entries().items()}
    return DecoderModel(Naive(plan.to_json(), weights), plan.to_json(), weights, {}, max_sequences=6)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_what_transformers_generates(original, roomy, batch, mode):
    ids, mask = batch
    expected, actual = (seeded(model, ids, attention_mask=mask, **MODES[mode]) for model in (original, roomy))
    assert torch.equal(actual, expected) and roomy.num_free_sequences == 6


@pytest.mark.parametrize("mode", ["greedy", "n-grams", "drawn", "drawn, with a penalty", "several of each"])
def test_the_engines_loop_is_transformers_loop(roomy, batch, mode):
    ids, mask = batch
    options = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    options |= MODES[mode]
    actual = seeded(roomy, ids, **options)
    expected = seeded(roomy, ids, custom_generate=GenerationMixin._sample, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for name in ("logits", "scores"):
        steps = torch.stack(actual[name]), torch.stack(expected[name])
        live = (actual.sequences[:, 9:] != 0).T  # rows that have ended are not computed
        assert torch.allclose(*(step[live] for step in steps), atol=1e-5)


@pytest.mark.parametrize("drawn", [{}, {"do_sample": True, "temperature": 0.4}])
def test_drafts_of_the_prompt_and_of_an_assistant_are_verified_as_in_transformers(original, roomy, drawn):
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]])
    options = {"max_new_tokens": 12, "eos_token_id": None, **drawn}
    expected = seeded(original, ids, **options, assistant_model=original)
    assert torch.equal(seeded(roomy, ids, **options, assistant_model=original), expected)
    plain = seeded(original, ids, **options)  # draws of the engine's own loop are those without drafts
    assert torch.equal(seeded(roomy, ids, **options, prompt_lookup_num_tokens=3), plain)
    expected = seeded(original, ids, assistant_model=original, **options)
    assert torch.equal(seeded(original, ids, assistant_model=roomy, **options), expected)
    assert roomy.num_free_sequences == 6


def test_beams_beyond_the_context_are_refused_and_hold_no_sequence(roomy):
    with pytest.raises(Reject, match="longer than the model's context of 24") as refusal:
        roomy.generate(torch.full((1, 20), 5), max_new_tokens=50, eos_token_id=None, num_beams=2)
    assert roomy.num_free_sequences == 6 and refusal.value.exit == 2


def test_generation_goes_on_from_a_cache(roomy, batch):
    ids, mask = batch
    options = {"attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None}
    before = roomy(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
    assert torch.equal(roomy.generate(ids, cache=before.cache, **options), roomy.generate(ids, **options))


def test_states_that_cannot_be_cut_back_are_computed_again_for_beams_and_take_no_drafts(original, batch):
    plan = Reader(capture(original), "bf16").build_plan()
    weights = {name: entry.make() for name, entry in plan.live_weight_entries().items()}
    engine = Naive(plan.to_json(), weights)
    engine.backward = False
    engine.forget = lambda sequence, length=0: Naive.forget(engine, sequence, 0 if length == 0 else 1 / 0)
    model, ids = DecoderModel(engine, plan.to_json(), weights, {}, max_sequences=3), batch[0][:1]
    assert torch.equal(seeded(model, ids, num_beams=3), seeded(original, ids, num_beams=3))
    with pytest.raises(Reject, match="bad-sampling"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=5)
    assert model.num_free_sequences == 3


def test_processors_and_criteria_of_the_caller_see_every_row(roomy, batch):
    ids, mask = batch
    shapes = []

    def processor(input_ids, scores):
        shapes.append((*input_ids.shape, len(scores)))
        return scores.index_fill(1, torch.tensor([11]), 1e4)

    class Full(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] == 12] * len(input_ids))

    options = {
        "logits_processor": LogitsProcessorList([processor]),
        "stopping_criteria": StoppingCriteriaList([Full()]),
    }
    found = roomy.generate(ids, attention_mask=mask, max_new_tokens=9, **options)
    assert found[:, 9:].tolist() == [[11, 11, 11]] * 2 and shapes == [(2, 9 + n, 2) for n in range(3)]


def test_a_stop_string_ends_a_row_where_it_is_complete(native, batch, tmp_path):
    ids, words = batch[0][:1], worlds.tokenizer(tmp_path, start=False)
    options = {"max_new_tokens": 12, "suppress_tokens": list(range(94, 128))}  # the others are bytes of ASCII
    plain = native.generate(ids, **options)[0, 9:]
    stop = words.decode(plain[2:4])
    found = native.generate(ids, stop_strings=[stop], tokenizer=words, **options)[0, 9:]
    assert stop in words.decode(found) and stop not in words.decode(found[:-1])
    assert torch.equal(found, plain[: len(found)])


def test_a_sequence_ends_at_the_models_context_and_past_it_is_an_error(native):
    ids = torch.full((1, 20), 5)
    assert native.generate(ids, max_new_tokens=50).shape == (1, 25)  # 24 positions, and what the last predicts
    with pytest.raises(Reject, match="25 tokens is longer than the model's context of 24"):
        native(torch.full((1, 25), 5))
    assert native.num_free_sequences == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": 0.0, "do_sample": True},
        {"top_p": -0.5, "do_sample": True},
        {"repetition_penalty": 0.0},
        {"stop_strings": "a"},
        {"forced_bos_token_id": 128},
        {"seed": 3, "num_beams": 2},
        {"prompt_lookup_num_tokens": 0},
        {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": -1},
        {"cache": DynamicCache()},
        {"attention_mask": torch.tensor([[0, 0]])},
    ],
)
def test_settings_that_mean_nothing_are_refused(native, settings):
    with pytest.raises(Reject, match="bad-sampling"):
        native.generate(torch.tensor([[4, 5]]), **settings)
    assert native.num_free_sequences == 3


def test_a_folders_generation_config_is_refused_or_generates(original):
    def opened(values):
        plan = Reader(capture(original), "bf16").build_plan()
        weights = {name: entry.make() for name, entry in plan.live_weight_entries().items()}
        return DecoderModel(Naive(plan.to_json(), weights), plan.to_json(), weights, {}, 2, values)

    with pytest.raises(Reject, match="bad-generation-config"):
        opened({"early_stopping": "soon"})
    strange = {"update": 5, "assistant_early_exit": 1, "compile_config": {"x": 1}, "penalty_alpha": None}
    model, ids = opened({**strange, "num_beams": 2, "eos_token_id": [2]}), torch.tensor([[4, 5]])
    options = {"num_beams": 2, "eos_token_id": [2], "pad_token_id": 0, "max_new_tokens": 4}
    expected = original.generate(ids, **options)
    assert torch.equal(model.generate(ids, max_new_tokens=4, pad_token_id=0), expected)


def test_who_talks_to_a_model_whose_config_asks_for_beams_hears_it_token_by_token(roomy, tmp_path):
    pieces, words = [], worlds.tokenizer(tmp_path, start=False)
    roomy.generation_config.num_beams = 2
    try:
        reply = ChatSession(roomy, words, 5).answer("Beams", pieces.append)
    finally:
        roomy.generation_config.num_beams = None
    assert reply.new_tokens == 5 and "".join(pieces) == reply.text


def test_too_many_open_sequences_and_unknown_tokens_are_refused(native):
    kept = [native(torch.tensor([[4]]), use_cache=True) for _ in range(3)]
    with pytest.raises(Reject, match="1 more sequences are asked for, and 0 are free"):
        native.generate(torch.tensor([[4]]))
    del kept
    with pytest.raises(Reject, match="outside of the 128"):
        native(torch.tensor([[128]]))
