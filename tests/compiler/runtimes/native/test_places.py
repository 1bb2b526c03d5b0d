"""Sequences that hold what an earlier prompt said: nothing but time changes."""

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.rows.forward import continuation_logprobs, last_logits, logits
from effc.compiler.runtimes.model import DecoderModel
from effc.compiler.runtimes.native.linears import NumberFormats
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.runtimes.sequence_pool import LEAST, SequencePool, tokens_in
from effc.kernels.engine import Engine
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.runtimes.native.test_plans import made


class Cut:
    """An engine that only remembers how long its sequences are, and must never be cut to more than they have."""

    def __init__(self, backward=True):
        self.backward, self.lengths = backward, {}

    def forget(self, number, length=0):
        had = self.lengths.get(number, 0)
        assert length == 0 or (self.backward and length <= had)
        self.lengths[number] = length


said = st.lists(st.integers(0, 1), max_size=20)


@settings(max_examples=300, deadline=None)
@given(
    turns=st.lists(st.tuples(said, said, st.sampled_from("ab"), st.integers(0, 2)), max_size=25),
    tokens=st.integers(0, 60),
    backward=st.booleans(),
)
@pytest.mark.slow
def test_a_place_holds_what_it_says_and_no_more_is_held_than_may_be(turns, tokens, backward):
    engine = Cut(backward)
    places = SequencePool(engine, 3, tokens)
    contents, owners, open_ = {}, {}, []
    for prompt, answer, owner, close in turns:
        if not len(places):
            close = 3
        else:
            number, held = places.acquire_slot(prompt, owner)
            assert held == engine.lengths.get(number, 0) and held < max(1, len(prompt))
            assert held == 0 or (contents[number][:held] == prompt[:held] and owners[number] == owner)
            assert number not in [n for n, *_ in open_]
            contents[number], owners[number] = prompt + answer, owner
            engine.lengths[number] = len(prompt + answer)
            open_.append((number, owner))
        for number, whose in [open_.pop() for _ in range(min(close, len(open_)))]:
            places.release(number, contents[number], whose)
        taken = [number for number, _ in open_]
        assert sum(n for number, n in engine.lengths.items() if number not in taken) <= tokens
        assert len(places) + len(open_) == 3


def test_the_longest_beginning_is_gone_on_with_and_the_oldest_place_goes_first():
    engine = Cut()
    places = SequencePool(engine, 2, 100)
    long, short = list(range(40)), list(range(20))
    (a, _), (b, _) = places.acquire_slot(short), places.acquire_slot(long)
    engine.lengths = {a: 20, b: 40}
    places.release(a, short)
    places.release(b, long)
    assert places.acquire_slot([*range(30), 99, 98]) == (b, 30)
    engine.lengths[b] = 32
    places.release(b, [*range(30), 99, 98])
    assert places.acquire_slot([7] * 50) == (a, 0)  # it begins like nothing that is held


def test_a_prompt_that_only_begins_alike_takes_another_place_while_there_is_one():
    engine = Cut()
    places = SequencePool(engine, 2, 100)
    a, _ = places.acquire_slot(range(40))
    engine.lengths[a] = 40
    places.release(a, list(range(40)))
    b, held = places.acquire_slot([*range(15), *[99] * 30])  # more would be lost of the first than won
    assert b != a and held == 0
    assert places.acquire_slot([*range(15), 98, 97]) == (a, 15)  # there is no other


def test_fewer_tokens_in_common_than_are_worth_it_are_computed_again():
    places = SequencePool(Cut(), 1, 100)
    number, _ = places.acquire_slot(range(30))
    places.release(number, list(range(30)))
    assert places.acquire_slot([*range(LEAST - 1), 99])[1] == 0


def test_what_a_token_takes_is_reckoned_from_the_plan():
    plan = {"slots": [{"kv_heads": 3, "head_dim": 64}, {"kv_heads": 2, "head_dim": 64, "value_dim": 32}]}
    assert tokens_in(10_000, plan) == 10_000 // (2 * 3 * 128 + 2 * 2 * 96) and tokens_in(10_000, {}) == 0


@pytest.fixture(scope="module", params=["llama", "llama, int8", "gemma2", "bamba"])  # and with windows, with states
def pair(request):
    """The same model, one that remembers."""
    name, _, kv_cache = request.param.partition(", ")
    plan = Reader(capture(made(name)), NumberFormats("bf16", kv_cache=kv_cache or "bf16")).build_plan()
    weights = {name: entry.make() for name, entry in plan.live_weight_entries().items()}

    def opened(remembers):
        engine = Engine(plan.to_json(), weights, 1, max_sequences=2, batch_invariant=True)
        return DecoderModel(engine, plan.to_json(), {}, {}, 2, prefix_tokens=remembers).eval()

    return opened(0), opened(300)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_model_that_remembers_computes_the_same_bits(pair, data):
    plain, mindful = pair
    told: list[int] = []
    for _ in range(data.draw(st.integers(2, 4))):
        cut = data.draw(st.integers(0, len(told)))
        more = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=24))
        told = [*told[:cut], *more]
        row = torch.tensor([told])
        if data.draw(st.booleans()):
            asked = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
            found, wanted = (model.generate(row, **asked) for model in (mindful, plain))
            told = wanted[0].tolist()
        else:
            keep = data.draw(st.integers(1, len(told)))
            found, wanted = (last_logits(model, row, keep) for model in (mindful, plain))
            assert torch.equal(wanted, logits(plain, row)[:, -keep:])
        assert torch.equal(found, wanted)


def test_an_answer_that_is_judged_behind_its_question_is_all_that_is_computed(pair):
    plain, mindful = pair
    question = list(range(3, 43))
    asked = [([*question, 7, 8, 9], 40), ([*question, 5], 40)]
    last_logits(mindful, torch.tensor([question]), 1)
    counted, run = [], mindful.engine.run
    mindful.engine.run = lambda ids, *more: counted.append(len(ids)) or run(ids, *more)
    try:
        found = [continuation_logprobs(mindful, [one])[0] for one in asked]
    finally:
        del mindful.engine.run
    assert found == [continuation_logprobs(plain, [one])[0] for one in asked]
    if mindful.engine.backward:
        assert counted == [3, 1]


def test_an_answer_that_breaks_off_leaves_a_sequence_that_is_right(pair):
    plain, mindful = pair
    row = torch.tensor([list(range(5, 30))])

    class Enough(Exception):
        pass

    class Streamer:
        seen = 0

        def put(self, value):
            self.seen += 1
            if self.seen == 4:
                raise Enough

        def end(self): ...

    with pytest.raises(Enough):
        mindful.generate(row, max_new_tokens=9, do_sample=False, eos_token_id=None, streamer=Streamer())
    assert mindful.num_free_sequences == 2
    whole = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    assert torch.equal(mindful.generate(row, **whole), plain.generate(row, **whole))
