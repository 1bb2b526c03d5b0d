"""Answers of many queries in one batch, each under its own adapters, are those that each gets alone."""

import threading
import time

import pytest
import torch
from effc.compiler.apps.rttc import batching
from effc.compiler.apps.rttc.adaptation import AdaptableModel, AdapterSettings
from effc.compiler.apps.rttc.attachment import default_attachment_paths
from effc.compiler.apps.rttc.batching import ROWS, Batcher, batching_matches_single
from effc.compiler.apps.rttc.generation import Cancelled, Settings
from effc.compiler.apps.rttc.policy import Policy
from effc.compiler.apps.rttc.prompts import Prompts
from effc.dsl.syntax.diagnostics import Reject
from transformers import LlamaForCausalLM

from tests import grids, tiny
from tests.compiler.apps.rttc.conftest import QUESTIONS, Config

KINDS = ("lora", "reft")


def listens() -> bool:
    """Nobody has left: what is asked before each token."""
    return False


def scattered(adaptable, seed, spread):
    draw = torch.Generator().manual_seed(seed)
    return {n: t + spread * torch.randn(t.shape, generator=draw) for n, t in adaptable.state().items()}


def together(batcher, asked):
    """What each of (ids, settings, state) is answered, all waiting before the first is begun."""
    found = [None] * len(asked)

    def say(at):
        ids, settings, state = asked[at]
        try:
            found[at] = batcher.generate_in_batch(ids, settings, listens, state)
        except Exception as error:
            found[at] = error

    threads = [threading.Thread(target=say, args=(at,)) for at in range(len(asked))]
    with batcher.exclusive_model():
        for thread in threads:
            thread.start()
        while len(batcher._waiting) < len(asked):
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_queries_of_one_batch_are_answered_to_the_token_as_each_alone_whatever_its_adapters_and_settings(world, kind):
    adaptable = world.adaptable(kind=kind)
    batcher = Batcher(world.model, world.prompts, adaptable)
    states = [None, *(scattered(adaptable, seed, 0.4) for seed in range(4)), None]
    settings = [
        Settings(max_tokens=12),
        Settings(max_tokens=3),
        Settings(max_tokens=9, temperature=0.9, seed=3),
        Settings(max_tokens=12, temperature=1.3, top_p=0.8, seed=7),
        Settings(max_tokens=10, stops=("e",)),
        Settings(max_tokens=6, temperature=0.9, seed=3),
    ]
    ids = [world.prompts.question(QUESTIONS[n] * (1 + n % 2)) for n in range(6)]
    asked = list(zip(ids, settings, states, strict=True))
    try:
        alone = [batcher.generate_in_batch(*one[:2], listens, one[2]) for one in asked]
        assert batcher.largest == 1
        assert together(batcher, asked) == alone and batcher.largest == 6
        bare = [batcher.generate_in_batch(*one[:2], listens) for one in asked]
        assert sum(a != b for a, b in zip(bare, alone, strict=True)) >= 3, "adapters that change no word show nothing"
    finally:
        adaptable.close()


def thinned(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(2)) < 0.5] = 0.0
    return model


def test_adapters_of_sparse_weights_are_off_when_they_are_switched_off():
    model, row = thinned(tiny.model("llama")), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        bare = model(row).logits
        adaptable = AdaptableModel(
            model, None, default_attachment_paths(model), AdapterSettings(rank=4, alpha=8.0), lambda text: [1]
        )
        adaptable.load_and_enable(scattered(adaptable, 0, 0.2))
        assert not torch.equal(model(row).logits, bare)
        adaptable.disable_adapters()
        assert torch.equal(model(row).logits, bare)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sparse", *grids.wide(tiny.NAMES, tiny.STAND)])
def test_logits_of_a_row_under_gathered_adapters_are_those_under_its_own_on_the_model(name, kind):
    model = thinned(tiny.model("llama")) if name == "sparse" else tiny.model(name)
    adaptable = AdaptableModel(
        model,
        None,
        default_attachment_paths(model, kind),
        AdapterSettings(kind=kind, rank=4, alpha=8.0),
        lambda text: [1],
    )
    rows = torch.randint(60, (3, 7), generator=torch.Generator().manual_seed(1))
    states = [scattered(adaptable, 0, 0.1), None, scattered(adaptable, 1, 0.1)]
    with torch.no_grad():
        with adaptable.with_state_per_row(states):
            found = model(rows).logits
        for row, state, logits in zip(rows, states, found, strict=True):
            adaptable.disable_adapters() if state is None else adaptable.load_and_enable(state)
            wanted = model(row[None]).logits[0]
            assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()  # products of other shapes round otherwise
        adaptable.disable_adapters()
        assert batching_matches_single(model, adaptable)
    adaptable.close()


class Deaf(LlamaForCausalLM):
    """Takes no notice of what is padded."""

    @classmethod
    def adopt(cls, model):
        model.__class__ = cls
        return model

    def forward(self, input_ids, attention_mask=None, **more):
        return super().forward(input_ids, **more)


@pytest.mark.parametrize("halved", [False, True])
def test_a_model_whose_rows_do_not_agree_answers_one_by_one(world, halved):
    """Below float32 rows round by their number; who reads padding as if it were words answers otherwise."""
    model = tiny.model("llama")
    model = model.to(torch.bfloat16) if halved else Deaf.adopt(model)
    assert not batching_matches_single(model, None)
    batcher = Batcher(model, Prompts(world.tokenizer, 64), None)
    asked = [([5, 9, 11 + n][n:], Settings(max_tokens=3), None) for n in range(3)]
    assert all(isinstance(said, tuple) for said in together(batcher, asked)) and batcher.largest == 1


def test_a_batch_is_as_large_as_the_models_context_and_its_bound_allow(world):
    batcher, context = Batcher(world.model, world.prompts, None), world.prompts.context
    short = [([5, 6], Settings(max_tokens=2), None)] * (ROWS + 3)
    assert len(set(together(batcher, short))) == 1 and batcher.largest == ROWS
    batcher = Batcher(world.model, world.prompts, None)
    assert (
        len(
            together(
                batcher, [([5] * (context - 4), Settings(max_tokens=4), None), ([6], Settings(max_tokens=9), None)]
            )
        )
        == 2
    )
    assert batcher.largest == 1  # beside the long prompt nine tokens more would have no position


def test_who_has_an_answer_waits_for_nobody_else_of_the_batch(world, monkeypatch):
    monkeypatch.setattr(batching, "eos_ids_of", lambda *_: ())  # none ends before its limit
    batcher, order = Batcher(world.model, world.prompts, None), []

    def noted(settings):
        batcher.generate_in_batch([5, 6], settings, listens)
        order.append((settings.max_tokens, batcher._busy))

    threads = [threading.Thread(target=noted, args=(Settings(max_tokens=most),)) for most in (240, 2)]
    with batcher.exclusive_model():
        for thread in threads:
            thread.start()
        while len(batcher._waiting) < 2:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order[0] == (2, True)


def test_one_who_leaves_and_one_who_asks_too_much_end_alone(world):
    batcher = Batcher(world.model, world.prompts, None)
    with pytest.raises(Cancelled):
        batcher.generate_in_batch([5], Settings(max_tokens=40), lambda: True)
    with pytest.raises(Reject, match="the model takes"):
        batcher.generate_in_batch([5] * world.prompts.context, Settings(), listens)
    assert batcher.generate_in_batch([5], Settings(max_tokens=2), listens)[1] == 2


def test_what_breaks_a_batch_is_heard_by_all_of_it_and_the_next_are_answered(world, monkeypatch):
    batcher = Batcher(world.model, world.prompts, None)
    asked = [([5, 6], Settings(max_tokens=2), None)] * 3
    assert batching_matches_single(world.model, None)
    with monkeypatch.context() as patch:
        patch.setattr(world.model, "generate", lambda **_: 1 / 0)
        batcher._agrees = True
        assert [type(said) for said in together(batcher, asked)] == [ZeroDivisionError] * 3
    assert all(said[1] == 2 for said in together(batcher, asked))


@pytest.mark.parametrize("kind", KINDS)
def test_clients_at_once_share_batches_and_get_what_each_gets_alone(world, kind):
    adaptable = world.adaptable(kind=kind)
    policy = Policy("ttt", count=4, shown=2)
    client = world.client(Config(), policy, adaptable, near=(0.9999, 0.9999))
    questions = QUESTIONS[:5]

    def ask(question):
        return client.answer_conversation([{"role": "user", "content": question}], Settings(max_tokens=6))

    try:
        alone = [ask(question).text for question in questions]  # trains
        found = {}
        threads = [threading.Thread(target=lambda q=q: found.update({q: ask(q)})) for q in questions]
        with client.batcher.exclusive_model():
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join()
    finally:
        adaptable.close()
    assert [found[question].text for question in questions] == alone
    assert all(one.decision.adapter_hit and one.decision.steps == 0 for one in found.values())


def test_the_same_new_question_many_times_at_once_is_trained_for_once(world):
    adaptable = world.adaptable()
    client = world.client(Config(), Policy("ttt", count=4, shown=2), adaptable, near=(2, 0.9999))
    found = []
    asked = [{"role": "user", "content": QUESTIONS[3]}]
    threads = [
        threading.Thread(target=lambda: found.append(client.answer_conversation(asked, Settings(max_tokens=4))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    adaptable.close()
    assert sorted(one.decision.steps > 0 for one in found) == [False, False, False, True]
    assert len({one.text for one in found}) == 1 and len(client.states) == 1


@pytest.mark.slow
def test_a_query_whose_adapters_are_kept_meanwhile_waits_for_no_other_training(world):
    adaptable = world.adaptable()
    client = world.client(Config(), Policy("ttt", count=4, shown=2), adaptable, near=(2, 0.9999))
    conversation, answers = [{"role": "user", "content": QUESTIONS[3]}], []

    def ask():
        answers.append(client.answer_conversation(conversation, Settings(max_tokens=4)))

    ask()
    (entry,) = client.states._entries.values()
    client.states._entries.clear()
    thread = threading.Thread(target=ask)
    with client.training:  # another query's
        thread.start()
        thread.join(1)
        assert len(answers) == 1
        client.states.put(entry.vector, entry.tensors)
        thread.join(30)
        assert len(answers) == 2
    adaptable.close()
    assert answers[1].text == answers[0].text and answers[1].decision.adapter_hit and not answers[1].decision.steps
