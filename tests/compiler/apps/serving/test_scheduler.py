"""Continuous batches: who is in a call, who waits, and what becomes of requests that end early."""

import gc
import queue
import threading
import weakref

import pytest
import torch
from effc.compiler.apps.serving.metrics import Metrics, ModelMetrics
from effc.compiler.apps.serving.request import Request
from effc.compiler.apps.serving.runner import CachedModel
from effc.compiler.apps.serving.scheduler import (
    SCORED_PROMPT_TOKENS,
    SHARED_PROMPT_TOKENS,
    SHORT_PROMPTS_TOKENS,
    QueueFull,
    Scheduler,
    Stopped,
)
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.reader import Reader
from effc.kernels.engine import Engine
from transformers import LlamaForCausalLM

from tests import worlds
from tests.compiler.runtimes.native.test_plans import made

CONTEXT = 400
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scheduler")
    worlds.tokenizer(folder, start=False)
    return worlds.llama(folder, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def model(folder):
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class Seen(CachedModel):
    """Remembers its calls: how many tokens of each sequence. `breaks`: the next call does. `odd`: a sequence whose
    logits are all `value`."""

    def __init__(self, model, sequences):
        super().__init__(model, sequences)
        self.calls, self.breaks, self.odd, self.value = [], False, None, float("nan")

    def run(self, ids, sequences, outputs):
        if self.breaks:
            self.breaks = False
            raise MemoryError("no room")
        self.calls.append({s: sequences.count(s) for s in sequences})
        logits = super().run(ids, sequences, outputs)
        odd = torch.tensor([sequences[at] == self.odd for at in outputs], dtype=torch.bool)
        return torch.where(odd[:, None], self.value, logits) if len(outputs) else logits


class Answer(queue.Queue):
    """Hears pieces, and keeps the tokens that they tell."""

    def __init__(self):
        super().__init__()
        self.ids = []

    def complete(self):
        """The text, and the last piece."""
        text = ""
        while True:
            piece = self.get(timeout=30)
            text += piece.text
            self.ids += [token.id for token in piece.tokens]
            if piece.finish:
                return text, piece


@pytest.fixture
def scheduler(model, tokenizer):
    made = Scheduler(Seen(model, 2), tokenizer, eos_ids=(), max_waiting=2)
    made.start()
    yield made
    made.stop()
    made.join(10)


def ask(scheduler, ids, most, **more):
    answer = Answer()
    return answer, scheduler.submit(Request(tuple(ids), most, **{"temperature": 0, **more}), answer.put)


def test_a_long_prompt_goes_beside_the_answers_of_others_a_piece_at_a_time(scheduler):
    first, _ = ask(scheduler, [5, 6], 60)
    first.get(timeout=30)  # it grows
    second, _ = ask(scheduler, [3 + n % 200 for n in range(300)], 2)
    assert second.complete()[1].count == 2 and first.complete()[1].count == 60
    shared = [call for call in scheduler._runner.calls if len(call) == 2]
    lengths = [max(call.values()) for call in shared]
    assert all(min(call.values()) == 1 for call in shared)  # nobody skipped a token for it
    assert lengths == [SHARED_PROMPT_TOKENS] * 4 + [300 - 4 * SHARED_PROMPT_TOKENS, 1]


def calls_beside_an_answer(model, tokenizer, lengths):
    """Tokens of each sequence by call, of prompts that come at once while an answer grows."""
    scheduler = Scheduler(Seen(model, 1 + len(lengths)), tokenizer, eos_ids=(), max_waiting=1 + len(lengths))
    scheduler.start()
    try:
        first, _ = ask(scheduler, [5, 6], 60)
        first.get(timeout=30)  # it grows
        answers = [Answer() for _ in lengths]
        prompts = [Request(tuple(3 + n % 200 for n in range(length)), 2, temperature=0) for length in lengths]
        scheduler.submit_all([(each, answer.put) for each, answer in zip(prompts, answers, strict=True)])
        for answer in (first, *answers):
            assert answer.complete()[1].finish == "length"
    finally:
        scheduler.stop()
        scheduler.join(10)
    return scheduler._runner.calls


def test_a_short_prompt_does_not_wait_for_a_long_one_which_goes_on_beside_it(model, tokenizer):
    calls = calls_beside_an_answer(model, tokenizer, (300, 60))
    pieces = [call for call in calls if max(call.values()) > 1][1:]
    growing, long, short = pieces[0].keys()
    assert (pieces[0][long], pieces[0][short]) == (SHARED_PROMPT_TOKENS // 4, 60)
    assert all(call[growing] == 1 for call in pieces)
    assert sum(call[long] for call in pieces) == 300


def test_a_crowd_of_short_prompts_is_read_in_few_calls_beside_an_answer(model, tokenizer):
    sums = [sum(call.values()) for call in calls_beside_an_answer(model, tokenizer, [100] * 11)]
    crowd = [n for n in sums[1:] if n > SHORT_PROMPTS_TOKENS // 4]
    assert len(crowd) == 2 and max(crowd) <= 1 + SHORT_PROMPTS_TOKENS + SHARED_PROMPT_TOKENS


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4}])
@pytest.mark.parametrize("length", [1, 130, 200])
def test_an_answer_is_what_transformers_generates(scheduler, model, length, settings):
    ids = torch.arange(3, 3 + length) % 255
    outputs = model.generate(
        ids[None],
        attention_mask=torch.ones_like(ids[None]),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        **settings,
    )[0]
    answer, _ = ask(scheduler, ids.tolist(), 20, alternatives=0, **settings)
    assert answer.complete()[1].finish == "length" and answer.ids == outputs[length:].tolist()


def test_a_model_with_a_state_answers_the_same_alone_and_among_others(tokenizer):
    model = made("bamba")
    plan = Reader(capture(model), "bf16").build_plan()
    weights = {name: entry.make() for name, entry in plan.live_weight_entries().items()}
    scheduler = Scheduler(
        Engine(plan.to_json(), weights, 1, max_sequences=3, batch_invariant=True), tokenizer, eos_ids=()
    )
    scheduler.start()
    prompts = [range(3, 3 + length) for length in (2, 60, 9, 31, 1)]
    alone, texts = [], []
    for ids in prompts:
        alone.append(ask(scheduler, ids, 20, alternatives=0)[0])
        texts.append(alone[-1].complete()[0])
    together = [ask(scheduler, ids, 20, alternatives=0)[0] for ids in prompts]
    assert [answer.complete()[0] for answer in together] == texts
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    scheduler.stop()


def test_an_answer_reaches_the_last_position_of_the_context(scheduler):
    assert ask(scheduler, [7] * (CONTEXT - 9), 9)[0].complete()[1].count == 9


def test_an_end_token_ends_an_answer_and_is_no_text(model, tokenizer):
    plain = model.generate(
        torch.tensor([[9, 8]]), attention_mask=torch.ones(1, 2), max_new_tokens=8, do_sample=False, eos_token_id=None
    )[0, 2:]
    end = int(plain[-1])
    scheduler = Scheduler(CachedModel(model, 2), tokenizer, eos_ids=(end,))
    scheduler.start()
    text, last = ask(scheduler, [9, 8], 50)[0].complete()
    scheduler.stop()
    assert last.finish == "stop" and last.count == plain.tolist().index(end) + 1
    assert text == tokenizer.decode(plain[: last.count - 1])


def test_more_than_there_are_places_for_wait_in_order_and_more_than_may_wait_are_refused(scheduler):
    running = [ask(scheduler, [5], 390) for _ in range(2)]
    for answer, _ in running:
        answer.get(timeout=30)
    waiting = [ask(scheduler, [5 + i], 2) for i in range(2)]
    with pytest.raises(QueueFull) as full:
        ask(scheduler, [5], 2)
    assert 1 <= full.value.seconds <= 60
    scheduler.cancel(waiting[0][1])
    assert waiting[0][0].complete()[1].finish == "cancelled"
    scheduler.cancel(running[0][1])
    assert running[0][0].complete()[1].finish == "cancelled"
    assert waiting[1][0].complete()[1].count == 2 and ask(scheduler, [5], 3)[0].complete()[1].count == 3


def test_requests_of_one_client_are_taken_together_or_not_at_all(scheduler):
    def submit(count, owner):
        answers = [Answer() for _ in range(count)]
        return answers, scheduler.submit_all([(Request((5, 6), 60, owner=owner), a.put) for a in answers])

    answers, _ = submit(9, "first")  # more than may run and wait: somebody who has nothing here is never refused
    others, _ = submit(1, "second")
    with pytest.raises(QueueFull):
        submit(1, "first")
    assert [answer.complete()[1].count for answer in (*answers, *others)] == [60] * 10
    assert len(submit(3, "first")[1]) == 3  # two places, and one waits


def test_a_prompt_whose_probabilities_are_told_is_read_in_short_pieces_and_none_of_it_is_known(scheduler):
    ask(scheduler, range(3, 203), 2)[0].complete()
    scheduler._runner.calls.clear()
    answer, _ = ask(scheduler, range(3, 203), 0, echo="the prompt", alternatives=1)
    text, last = answer.complete()
    assert text == "the prompt" and last.count == 0 and answer.ids == list(range(3, 203))
    assert [sum(call.values()) for call in scheduler._runner.calls] == [SCORED_PROMPT_TOKENS] * 3 + [
        200 - 3 * SCORED_PROMPT_TOKENS
    ]


def test_logits_of_a_prompt_that_are_no_numbers_end_its_request_and_no_other(scheduler):
    first, job = ask(scheduler, [5, 6, 7], 100)
    first.get(timeout=30)
    scheduler._runner.odd = 1 - job.sequence
    last = ask(scheduler, range(3, 103), 0, echo="", alternatives=0)[0].complete()[1]
    assert last.finish == "logits_not_finite" and first.complete()[1].count == 100 and scheduler.alive


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_echo_of_logits_that_are_no_numbers_ends_its_request(scheduler, value):
    scheduler._runner.odd, scheduler._runner.value = 0, value
    last = ask(scheduler, range(3, 103), 0, echo="", alternatives=1)[0].complete()[1]
    assert last.finish == "logits_not_finite"


def test_a_scheduler_that_was_never_started_is_no_queue_of_the_metrics(model, tokenizer):
    metrics = ModelMetrics(Metrics(), "m")
    known = weakref.ref(Scheduler(CachedModel(model, 1), tokenizer, (), metrics=metrics))
    gc.collect()
    assert known() is None


def test_a_call_that_breaks_ends_its_requests_and_not_those_after_it(scheduler):
    outputs = ask(scheduler, [5, 6, 7], 5)[0].complete()[0]
    scheduler._runner.breaks = True
    last = ask(scheduler, [5, 6, 7], 5)[0].complete()[1]
    assert last.finish == "failed" and last.error.startswith("MemoryError at ") and "no room" not in last.error
    assert ask(scheduler, [5, 6, 7], 5)[0].complete()[0] == outputs and scheduler.alive


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_end_their_request_and_no_other(scheduler, temperature):
    first, job = ask(scheduler, [5, 6, 7], 300)
    first.get(timeout=30)  # it has its sequence
    scheduler._runner.odd = 1 - job.sequence
    other, _ = ask(scheduler, [8, 9], 5, temperature=temperature)
    last = other.complete()[1]
    assert last.finish == "logits_not_finite" and "NaN" in last.error
    assert first.complete()[1].count == 300 and scheduler.alive


def test_one_that_stops_does_not_wait_for_its_call(model, tokenizer):
    class Slow(CachedModel):
        def run(self, *tokens):
            began.set()
            assert goes_on.wait(30)
            return super().run(*tokens)

    began, goes_on = threading.Event(), threading.Event()
    scheduler = Scheduler(Slow(model, 1), tokenizer, eos_ids=())
    scheduler.start()
    answer, _ = ask(scheduler, [5], 9)
    assert began.wait(30)
    scheduler.stop()
    assert answer.complete()[1].error == "the server stops" and scheduler._thread.is_alive()
    goes_on.set()
    scheduler.join(10)
    assert answer.empty() and not scheduler._thread.is_alive()


def test_a_scheduler_that_stops_tells_all_who_wait(scheduler):
    answers = [ask(scheduler, [5], 390)[0] for _ in range(4)]
    answers[0].get(timeout=30)
    scheduler.stop()
    assert [answer.complete()[1].error for answer in answers] == ["the server stops"] * 4
    with pytest.raises(Stopped):
        ask(scheduler, [5], 1)
    scheduler.join(10)
    assert not scheduler.alive
