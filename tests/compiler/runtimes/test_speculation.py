"""Drafts: how long they are, what they may lose, and that tokens are those of a model without them."""

import sys
import threading
from collections import Counter
from itertools import pairwise

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.generation import parse_generation_config
from effc.compiler.runtimes.model import DecoderModel
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.runtimes.speculation import DRAFT_TOKENS, CallCosts, PromptLookup
from effc.dsl.syntax.diagnostics import Reject
from effc.kernels.engine import Engine
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tests import tiny
from tests.compiler.runtimes.native.test_plans import halved

CONTEXT = 160
LOOP = [5, 6, 7, 8, 9] * 5  # a draft is tried wherever it goes on


# -- lengths and losses --------------------------------------------------------------------------------------


def measured(row_cost: float) -> CallCosts:
    costs = CallCosts()
    for rows in range(1, DRAFT_TOKENS + 2):
        costs.observe(rows, 1 + row_cost * (rows - 1))
    return costs


def seconds_of(as_expected: list[bool], row_cost: float) -> tuple[float, float]:
    """Seconds of a text with drafts and without, where each token is or is not what drafts expect."""
    ids, costs, seconds, at = [1, 2, 3] * 4, measured(row_cost), 0.0, 0
    lookup = PromptLookup(ids, costs)
    while at < len(as_expected):
        draft = lookup.draft(DRAFT_TOKENS)
        rows = 1 + len(draft)
        seconds += 1 + row_cost * (rows - 1)
        costs.observe(rows, 1 + row_cost * (rows - 1))
        accepted = 0
        while accepted < len(draft) and at + accepted < len(as_expected) and as_expected[at + accepted]:
            accepted += 1
        if draft:
            lookup.observe(draft, accepted, 1 + row_cost * len(draft))
        at += 1 + accepted
        for _ in range(1 + accepted):
            ids.append(ids[-3])
    return seconds, float(at)


def test_threads_may_share_the_costs_of_calls():
    costs, began, ended, errors = CallCosts(), threading.Event(), threading.Event(), []
    costs.observe(1, 1.0)

    def ask():
        try:
            while not ended.is_set():
                costs.increase(1, 50_000)
                began.set()
        except RuntimeError as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert began.wait(30)
        for rows in range(2, 20_000):
            costs.observe(rows, 1.0)
            costs.observe(1, 1.0)
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors


def test_a_checkpoint_turns_no_drafts_on():
    config = parse_generation_config({"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": "many", "top_k": 5})
    assert (config.prompt_lookup_num_tokens, config.max_matching_ngram_size, config.top_k) == (None, None, 5)


@given(st.lists(st.booleans(), min_size=1, max_size=400), st.sampled_from([0.0, 0.05, 0.13]))
def test_drafts_lose_a_quarter_of_a_token_and_a_hundredth_of_the_time_at_most(expected, row_cost):
    with_drafts, without = seconds_of(expected, row_cost)
    assert with_drafts <= without + 0.25 + 0.01 * without + 1e-6


def test_text_that_drafts_expect_takes_a_third_of_the_calls_and_less():
    with_drafts, without = seconds_of([True] * 300, 0.13)
    assert with_drafts < without / 2.5


def test_drafts_stop_where_they_are_rejected_and_are_tried_again():
    ids, costs = [1, 2, 3] * 4, measured(0.13)
    lookup, lengths = PromptLookup(ids, costs), []
    for _ in range(300):
        draft = lookup.draft(DRAFT_TOKENS)
        lengths.append(len(draft))
        if draft:
            lookup.observe(draft, 0, 1 + 0.13 * len(draft))
        costs.observe(1, 1.0)
        ids.append(ids[-3])
    assert 0 < sum(length > 0 for length in lengths[100:]) < 40 and sum(lengths) * 0.13 < 0.25 + 3


def test_costs_of_rows_that_were_not_measured_follow_from_those_that_were_until_these_are_old():
    costs = CallCosts()
    assert costs.increase(1, 4) == pytest.approx(0.52)
    costs.observe(1, 2.0)
    costs.observe(5, 3.0)
    assert costs.increase(1, 4) == pytest.approx(0.5) and costs.increase(1, 2) == pytest.approx(0.25)
    costs.observe(1, 100.0)  # another process had the core
    assert costs.increase(1, 4) == pytest.approx(0.0)  # counted as 4: the mean of two is 3
    for _ in range(256):
        costs.observe(1, 2.0)
    assert costs.increase(1, 4) == pytest.approx(0.52)


# -- tokens --------------------------------------------------------------------------------------------------


class KnownCosts(CallCosts):
    """Costs that no clock decides."""

    def observe(self, rows, seconds):
        pass

    def increase(self, rows, extra):
        return 0.02 * extra

    def excess(self, rows, extra, seconds):
        return 0.02 * extra


class Calls(Engine):
    """Notes the number of tokens of each call."""

    counts: list[int]

    def run(self, ids, sequences, outputs=None):
        self.counts.append(len(ids))
        return super().run(ids, sequences, outputs)


@pytest.fixture(scope="module")
def original():
    return halved(tiny.model("llama", max_position_embeddings=CONTEXT))


@pytest.fixture(scope="module")
def native(original):
    plan = Reader(capture(original), "bf16").build_plan()
    weights = {name: entry.make() for name, entry in plan.live_weight_entries().items()}
    body = plan.to_json()
    engine = Calls(body, weights, 1, max_sequences=2, batch_invariant=True)
    engine.counts = []
    model = DecoderModel(engine, body, weights, {}, max_sequences=2, prefix_tokens=400)
    model.call_costs = KnownCosts()
    return model


@pytest.fixture
def copying(native):
    """Settings under which the model goes on with its prompt for 30 tokens."""
    follow = dict(pairwise(LOOP))

    class Copies(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.tensor([follow[int(input_ids[0, -1])]]), 1e4)

    return {"logits_processor": LogitsProcessorList([Copies()])}


def speculative(native, ids=LOOP, **settings):
    """Tokens without drafts and with them, and the tokens of each call of the engine with them."""
    row = torch.tensor([list(ids)])
    options = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0, **settings}
    torch.manual_seed(3)
    plain = native.generate(row, **options)
    native.engine.counts = []
    torch.manual_seed(3)
    drafted = native.generate(row, prompt_lookup_num_tokens=DRAFT_TOKENS, **options)
    return plain, drafted, native.engine.counts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "temperature": 0.3},
        {"do_sample": True, "temperature": 1.5, "top_k": 5, "repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 3},
        {"max_matching_ngram_size": 1},
        {"max_matching_ngram_size": 1 << 30},
        {"eos_token_id": list(range(20, 60))},
        {"seed": 5, "do_sample": True},
    ],
)
@pytest.mark.parametrize("start", range(4))
def test_tokens_are_those_without_drafts_drawn_ones_too(native, settings, start):
    ids = torch.randint(3, 128, (12,), generator=torch.Generator().manual_seed(start)).tolist() * 2
    plain, drafted, _ = speculative(native, ids, **settings)
    assert torch.equal(drafted, plain) and native.num_free_sequences == 2


def test_text_that_is_copied_takes_fewer_calls(native, copying):
    plain, drafted, counts = speculative(native, **copying)
    assert torch.equal(drafted, plain) and plain[0, 25:].tolist() == LOOP[:5] * 8
    assert len(counts) < 30 and max(counts[1:]) > 3


def test_logits_of_each_step_are_those_without_drafts_to_the_bit(native, copying):
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, **copying}
    plain, drafted, _ = speculative(native, **options)
    for name in ("logits", "scores"):
        assert torch.equal(torch.stack(drafted[name]), torch.stack(plain[name]))


@pytest.mark.slow
def test_frequencies_of_drawn_tokens_are_their_probabilities(native):
    """By a chi-squared test of 600 draws behind drafts of two tokens and more; the seeds are fixed."""
    row, top = torch.tensor([LOOP]), 4
    options = {"do_sample": True, "top_k": top, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}

    def chances(ids):
        values, indices = native(torch.tensor([ids])).logits[0, -1].topk(top)
        return dict(zip(indices.tolist(), values.softmax(-1).tolist(), strict=True))

    expected = {
        (first, second): chance * share
        for first, chance in chances(LOOP).items()
        for second, share in chances([*LOOP, first]).items()
    }
    torch.manual_seed(0)
    draws = Counter(
        tuple(native.generate(row, prompt_lookup_num_tokens=5, **options)[0, len(LOOP) :][:2].tolist())
        for _ in range(600)
    )
    assert draws.keys() <= expected.keys(), "a token was drawn that top_k leaves out"
    statistic = sum((draws[pair] - 600 * chance) ** 2 / (600 * chance) for pair, chance in expected.items())
    assert statistic < 37.7  # of 15 degrees of freedom, exceeded once in a thousand


def test_a_row_with_drafts_ends_where_the_context_does(native, copying):
    ids = (LOOP * 6)[: CONTEXT - 7]
    plain, drafted, counts = speculative(native, ids, **copying)
    assert torch.equal(drafted, plain) and plain.shape == (1, CONTEXT + 1) and max(counts[1:]) > 1


@pytest.mark.parametrize("most", [1, 2, 7])
def test_no_more_tokens_than_asked_for_come_of_a_draft(native, copying, most):
    plain, drafted, _ = speculative(native, max_new_tokens=most, **copying)
    assert torch.equal(drafted, plain) and plain.shape[1] == len(LOOP) + most


def test_an_end_in_the_middle_of_a_draft_ends_the_row_and_leaves_a_prefix_that_goes_on(native, copying):
    plain, drafted, _ = speculative(native, eos_token_id=[9], **copying)
    assert drafted[0].tolist() == [*LOOP, 5, 6, 7, 8, 9] and torch.equal(drafted, plain)
    longer = torch.cat([drafted, torch.tensor([[3, 4]])], 1)
    native.engine.counts = []
    after = native.generate(longer, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    assert native.engine.counts[0] < 6  # the rest of the prompt was kept
    assert torch.equal(after, unread_copy(native).generate(longer, max_new_tokens=5, eos_token_id=None))


def test_a_processor_that_breaks_in_a_draft_leaves_no_rejected_token_in_what_is_kept(native, copying):
    class Breaks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == len(LOOP) + 7:
                raise RuntimeError("it breaks")
            return scores

    model = unread_copy(native)
    broken = {"logits_processor": LogitsProcessorList([*copying["logits_processor"], Breaks()])}
    with pytest.raises(RuntimeError, match="it breaks"):
        model.generate(torch.tensor([LOOP]), max_new_tokens=40, prompt_lookup_num_tokens=9, **broken)
    assert model.num_free_sequences == 1 and model.engine.length(0) == len(LOOP) + 6
    different = torch.tensor([[*LOOP, 5, 6, 40, 41, 42]])
    options = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(different, **options), unread_copy(native).generate(different, **options))


def unread_copy(native):
    """A model of the same weights that has read nothing."""
    weights = {name.replace("/", "."): tensor for name, tensor in native.weights.named_buffers()}
    engine = Engine(native.plan, weights, 1, max_sequences=1, batch_invariant=True)
    model = DecoderModel(engine, native.plan, weights, {}, max_sequences=1, prefix_tokens=400)
    model.call_costs = KnownCosts()
    return model


def test_streamers_and_criteria_hear_of_each_token_alone(native, copying):
    class Streamer:
        def __init__(self):
            self.shapes, self.ended = [], False

        def put(self, value):
            self.shapes.append(tuple(value.shape))

        def end(self):
            self.ended = True

    class Lengths(StoppingCriteria):
        seen: list[int] = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(input_ids.shape[1])
            return torch.tensor([False])

    streamer = Streamer()
    options = {"max_new_tokens": 20, "eos_token_id": None, "stopping_criteria": StoppingCriteriaList([Lengths()])}
    native.generate(torch.tensor([LOOP]), streamer=streamer, prompt_lookup_num_tokens=9, **options, **copying)
    assert streamer.shapes == [(1, 25)] + [(1,)] * 20 and streamer.ended
    assert Lengths.seen == list(range(26, 46))


def test_drafts_for_several_rows_are_refused(native):
    with pytest.raises(Reject, match="drafts are for one row, and 2 are given"):
        native.generate(torch.tensor([LOOP, LOOP]), prompt_lookup_num_tokens=3)
    assert native.num_free_sequences == 2
