"""Answers with drafts of their own n-grams: the same tokens, in fewer calls, whatever else is asked for."""

import pytest
import torch
from effc.compiler.apps.serving.request import Request
from effc.compiler.apps.serving.scheduler import SPECULATIVE_ROWS, Scheduler
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.runtimes.speculation import DRAFT_TOKENS
from effc.kernels.engine import Engine
from transformers import AutoTokenizer, LlamaForCausalLM

from tests import worlds
from tests.compiler.apps.serving.test_scheduler import Answer
from tests.compiler.runtimes.test_speculation import KnownCosts

CONTEXT = 400
torch.set_num_threads(1)


class Calls(Engine):
    """Notes how many tokens of each sequence a call has."""

    counts: list[dict[int, int]]

    def run(self, ids, sequences, outputs=None):
        self.counts.append({s: sequences.count(s) for s in sequences})
        return super().run(ids, sequences, outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    worlds.tokenizer(folder, start=False)
    return worlds.llama(folder, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def plan_and_weights(folder):
    plan = Reader(capture(LlamaForCausalLM.from_pretrained(folder).eval()), "bf16").build_plan()
    return plan.to_json(), {name: entry.make() for name, entry in plan.live_weight_entries().items()}


@pytest.fixture(scope="module")
def schedulers(folder, plan_and_weights):
    """One without drafts and one with them, which starts nothing that is not asked of it."""
    both = []
    for draft_tokens in (0, DRAFT_TOKENS):
        engine = Calls(*plan_and_weights, 1, max_sequences=4, batch_invariant=True)
        engine.counts = []
        both.append(
            Scheduler(
                engine,
                AutoTokenizer.from_pretrained(folder),
                eos_ids=(250,),
                prefix_cache_tokens=2000,
                draft_tokens=draft_tokens,
            )
        )
        both[-1]._costs = KnownCosts()
        both[-1].start()
    yield both
    for scheduler in both:
        scheduler.stop()
        scheduler.join(10)


def ask(scheduler, ids, most, **more):
    answer = Answer()
    scheduler.submit(Request(tuple(ids), most, **{"temperature": 0, "alternatives": 2, **more}), answer.put)
    return answer


PROMPTS = [list(range(20, 20 + n)) * 2 for n in (5, 9, 30, 3)]  # greedy answers of random weights soon repeat


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "top_k": 3, "seed": 4},
        {"temperature": 0.6, "top_p": 0.8, "seed": 4},
        {"repetition_penalty": 1.3},
        {"alternatives": None},
    ],
)
def test_answers_are_those_without_drafts_to_the_bit(schedulers, settings):
    outcomes = []
    for scheduler in schedulers:
        answers = [ask(scheduler, ids, 60, **settings) for ids in PROMPTS]
        ended = [(*answer.complete(), answer.ids) for answer in answers]
        outcomes.append([(text, last.finish, last.count, ids) for text, last, ids in ended])
    assert outcomes[0] == outcomes[1]


def test_probabilities_of_drafted_tokens_are_those_of_the_model(schedulers):
    pieces = []
    for scheduler in schedulers:
        answer = ask(scheduler, PROMPTS[0], 50, alternatives=3)
        tokens = []
        while True:
            piece = answer.get(timeout=30)
            tokens += piece.tokens
            if piece.finish:
                break
        pieces.append(tokens)
    assert pieces[0] == pieces[1] and len(pieces[0]) == 50


def test_a_repeating_answer_takes_fewer_calls_and_is_counted(schedulers):
    plain, drafting = schedulers
    for scheduler in schedulers:
        scheduler._runner.counts = []
        assert ask(scheduler, PROMPTS[1], 200).complete()[1].count == 200
    assert len(drafting._runner.counts) < 0.7 * len(plain._runner.counts)
    text = drafting.metrics.server.text().decode()
    drafted, accepted = (
        float(next(line for line in text.splitlines() if line.startswith(f"{name}{{")).split()[-1])
        for name in ("effc_draft_tokens_total", "effc_accepted_draft_tokens_total")
    )
    assert 60 < accepted <= drafted
    assert 'effc_draft_tokens_total{model=""} 0.0' in plain.metrics.server.text().decode()


def test_a_call_with_drafts_of_several_answers_has_at_most_sixteen_tokens(schedulers):
    _, drafting = schedulers
    answers = [ask(drafting, ids, 150) for ids in PROMPTS]
    for answer in answers:
        answer.get(timeout=30)  # its prompt has been read
    drafting._runner.counts = calls = []
    for answer in answers:
        answer.complete()
    assert all(sum(call.values()) <= SPECULATIVE_ROWS for call in calls)
    assert any(len(call) == 4 and 1 < max(call.values()) <= SPECULATIVE_ROWS // 4 for call in calls)


def test_a_stop_string_within_a_draft_ends_the_answer_there(schedulers):
    text = ask(schedulers[0], PROMPTS[2], 120).complete()[0]
    stop = text[80:84]
    outcomes = []
    for scheduler in schedulers:
        answer, last = ask(scheduler, PROMPTS[2], 120, stops=(stop,)).complete()
        outcomes.append((answer, last.finish, last.count))
    assert outcomes[0] == outcomes[1] and outcomes[0][1] == "stop"


def test_a_conversation_goes_on_from_what_was_accepted_and_from_nothing_else(schedulers):
    for prompt in PROMPTS:
        answers = [ask(scheduler, prompt, 90) for scheduler in schedulers]
        for answer in answers:
            answer.complete()
        longer = [*prompt, *answers[0].ids, 7, 8]
        again = [ask(scheduler, longer, 40) for scheduler in schedulers]
        pieces = [answer.complete()[1] for answer in again]
        assert again[0].ids == again[1].ids
        assert pieces[1].n_cached == pieces[0].n_cached > len(prompt)


def test_an_answer_with_drafts_reaches_the_last_position_of_the_context(schedulers):
    prompt = ([30, 31, 32] * 200)[: CONTEXT - 50]
    assert [ask(scheduler, prompt, 50).complete()[1].count for scheduler in schedulers] == [50, 50]


def test_who_leaves_in_the_middle_leaves_a_sequence_that_others_can_use(schedulers):
    _, drafting = schedulers
    for _ in range(6):
        answer = Answer()
        job = drafting.submit(Request(tuple(PROMPTS[3]), 300, temperature=0), answer.put)
        answer.get(timeout=30)
        drafting.cancel(job)
        assert answer.complete()[1].finish in ("cancelled", "length")
    results = [ask(scheduler, PROMPTS[3], 30) for scheduler in schedulers]
    assert results[0].complete()[0] == results[1].complete()[0]
