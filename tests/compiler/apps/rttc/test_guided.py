"""The client over a real model: R3, R4, R6, R7 of the digest, and what happens when something is missing."""

import math
from dataclasses import replace

import pytest
import torch
from effc.compiler.apps.rttc.adaptation import indices_above_min_of_mean_and_median
from effc.compiler.apps.rttc.generation import Cancelled, Settings
from effc.compiler.apps.rttc.policy import Policy
from effc.compiler.apps.rttc.retrieval import Local, Unreachable
from effc.compiler.apps.rttc.reward import SelfLikelihood, require_finite_scores
from effc.compiler.apps.rttc.sample import Sample
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st

from tests.compiler.apps.rttc.conftest import QUESTIONS, Config, answer_of

SHORT = Settings(max_tokens=6)
TTT = Policy("ttt", count=4, shown=2)


def asked(question):
    return [{"role": "user", "content": question}]


@pytest.fixture(params=["lora", "reft"])
def adaptable(world, request):
    """Either kind of adapters: every law below is of both."""
    made = world.adaptable(kind=request.param, lr=5e-3 if request.param == "lora" else 2e-2)
    yield made
    made.close()


def test_training_lowers_the_loss_on_its_samples_in_as_many_steps_as_told_and_leaves_the_base(world, adaptable):
    before = adaptable.frozen_weights_checksum()
    samples = [Sample(q, answer_of(q)) for q in QUESTIONS[:6]]
    trained = adaptable.reset_and_train(samples)
    assert len(trained.losses) == math.ceil(6 / 4) * 2 and trained.losses[-1] < trained.losses[0]
    assert all(p.grad is None for n, p in world.model.named_parameters() if "lora" not in n)
    assert adaptable.frozen_weights_checksum() == before


def test_states_of_reft_are_small_and_edit_every_position(world, adaptable):
    if adaptable.regime.kind == "lora":
        return
    samples = [Sample(q, answer_of(q)) for q in QUESTIONS[:4]]
    adaptable.reset_and_train(samples)
    width, layers = world.model.config.hidden_size, world.model.config.num_hidden_layers
    assert sum(t.numel() for t in adaptable.state().values()) == layers * (2 * 4 * width + 4)
    ids = torch.tensor([adaptable._sample_ids_and_answer_start(samples[0])[0]])
    with torch.no_grad():
        edited = world.model(ids).logits
        adaptable.disable_adapters()
        bare = world.model(ids).logits
    assert (edited - bare).abs().amax(-1).gt(1e-4).all()


def test_the_gradient_is_that_of_the_plain_loss(world, adaptable):
    samples = [Sample(q, answer_of(q)) for q in QUESTIONS[:3]]
    rows = [adaptable._sample_ids_and_answer_start(sample) for sample in samples]
    adaptable.load_and_enable(adaptable._initial)
    own = adaptable._parameters
    for parameter in own.values():
        parameter.requires_grad_(True)
    total, count = 0.0, sum(len(ids) - begin for ids, begin in rows)
    for ids, begin in rows:
        row = torch.tensor([ids])
        values = world.model(row).logits[0, begin - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(values, row[0, begin:], reduction="sum")
    wanted = torch.autograd.grad(total / count, list(own.values()))
    found = {}
    optimizer = torch.optim.SGD(own.values(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: found.update({n: p.grad.clone() for n, p in own.items()}))
    loss = adaptable._optimizer_step(optimizer, rows, [1.0] * 3)
    norm = torch.stack([g.norm() for g in wanted]).norm().clamp(min=1.0)  # clipped at 1
    assert loss == pytest.approx(float(total.detach()) / count, abs=1e-5)
    for gradient, mine in zip(wanted, found.values(), strict=True):
        assert torch.allclose(gradient / norm, mine, atol=1e-5)


def test_a_query_is_answered_the_same_after_another_one_as_alone(world, adaptable):
    def texts(*questions):
        client = world.client(Config(), TTT, adaptable)
        return [client.answer_conversation(asked(q), SHORT).text for q in questions]

    alone = texts(QUESTIONS[9])[0]
    assert texts(QUESTIONS[0], QUESTIONS[9])[1] == alone
    assert (
        world.client(Config(), Policy("direct"), adaptable).answer_conversation(asked(QUESTIONS[9]), SHORT).text
        != alone
    )


def test_the_same_query_again_takes_the_adapters_of_the_first_and_trains_nothing(world, adaptable):
    client = world.client(Config(), TTT, adaptable, near=(0.999, 0.999))
    first, second = (client.answer_conversation(asked(QUESTIONS[3]), SHORT) for _ in range(2))
    assert first.decision.steps > 0 and not first.decision.adapter_hit
    assert second.decision.steps == 0 and second.decision.adapter_hit and second.text == first.text
    assert client.states.hits == 1


def test_cached_adapters_and_lists_are_there_after_a_restart_to_the_bit(world, adaptable, tmp_path):
    first = world.client(Config(), TTT, adaptable, near=(0.999, 0.999), folder=tmp_path)
    wanted = first.answer_conversation(asked(QUESTIONS[3]), SHORT)
    again = world.client(Config(), TTT, adaptable, near=(0.999, 0.999), folder=tmp_path)
    found = again.answer_conversation(asked(QUESTIONS[3]), SHORT)
    assert found.decision.adapter_hit and found.text == wanted.text
    state, vector = (
        again.states.find_nearest(again._facts.center_and_normalize(world.embedder.embed([QUESTIONS[3]])[0])),
        None,
    )
    assert vector is None and all(torch.equal(state[n], t) for n, t in adaptable.state().items())


def test_an_answer_worse_than_the_direct_one_is_neither_given_nor_kept(world, adaptable):
    class Falling:
        name = scale = "falls"

        def __init__(self):
            self.at = 0.0

        def score(self, question, answers):
            self.at -= 1
            return [self.at]

    client = world.client(Falling(), Policy("best", count=4, shown=2), adaptable, near=(2, 0.999))
    found = client.answer_conversation(asked(QUESTIONS[1]), SHORT)
    assert found.decision.branch == "direct" and set(found.decision.rewards) == {"direct", "rag", "ttt"}
    assert len(client.states) == 0


def test_without_the_server_the_direct_answer_is_given_and_the_decision_says_so(world, adaptable):
    class Down:
        def facts(self):
            raise Unreachable("http://kb does not answer")

        def retrieve(self, vector, count):
            raise Unreachable("http://kb does not answer")

    class Dies(Local):
        def retrieve(self, vector, count):
            raise Unreachable("http://kb does not answer")

    plain = world.client(Config(), Policy("direct"), adaptable).answer_conversation(asked(QUESTIONS[0]), SHORT).text
    for retriever in (Down(), Dies(world.base)):
        for kind in ("sequential", "best", "rag", "ttt"):
            policy = Policy(kind, direct=1, rag=1, count=4, shown=2)
            found = world.client(Config(), policy, adaptable, retriever).answer_conversation(asked(QUESTIONS[0]), SHORT)
            assert found.text == plain and found.decision.branch == "direct"
            assert found.decision.note == "http://kb does not answer"


def test_a_base_of_another_embedder_is_not_asked_and_the_decision_says_so(world, adaptable):
    class Foreign(Local):
        def facts(self):
            return replace(super().facts(), embedder="another")

        def retrieve(self, vector, count):
            raise AssertionError("its vectors mean nothing here")

    found = world.client(Config(), Policy("rag"), adaptable, Foreign(world.base)).answer_conversation(
        asked(QUESTIONS[0]), SHORT
    )
    assert found.decision.branch == "direct" and "embedded by another model" in found.decision.note


def test_a_server_that_dies_while_its_new_version_is_looked_at_leaves_the_direct_answer(world, adaptable):
    class Dying(Local):
        def facts(self):
            told.append("facts")
            if len(told) > 1:
                raise Unreachable("http://kb does not answer")
            return super().facts()

        def retrieve(self, vector, count):
            return replace(super().retrieve(vector, count), version="newer")

    told = []
    found = world.client(Config(), Policy("rag"), adaptable, Dying(world.base)).answer_conversation(
        asked(QUESTIONS[0]), SHORT
    )
    assert found.decision.branch == "direct" and found.decision.note == "http://kb does not answer"


def test_a_reward_that_is_no_number_gives_the_direct_answer_and_says_so(world, adaptable):
    class Broken(Config):
        def score(self, question, answers):
            return require_finite_scores([float("nan")], "broken")

    found = world.client(Broken(), Policy(count=4, shown=2), adaptable).answer_conversation(asked(QUESTIONS[0]), SHORT)
    assert found.decision.branch == "direct" and found.decision.note == "the reward `broken` gave nan"


def test_a_new_version_of_the_base_empties_both_caches(world, adaptable):
    class Renewed(Local):
        def facts(self):
            return replace(super().facts(), version=state["version"])

        def retrieve(self, vector, count):
            return replace(super().retrieve(vector, count), version=state["version"])

    state = {"version": "one"}
    client = world.client(Config(), TTT, adaptable, Renewed(world.base), near=(0.999, 0.999))
    client.answer_conversation(asked(QUESTIONS[0]), SHORT)
    assert len(client.states) == len(client.lists) == 1
    state["version"] = "two"
    client.answer_conversation(asked(QUESTIONS[20]), SHORT)  # another query hears of it
    assert client.answer_conversation(asked(QUESTIONS[0]), SHORT).decision.adapter_hit is False


def test_one_who_leaves_ends_the_answer(world, adaptable):
    with pytest.raises(Cancelled):
        world.client(Config(), TTT, adaptable).answer_conversation(
            asked(QUESTIONS[0]), SHORT, is_cancelled=lambda: True
        )


def test_a_prompt_too_long_is_refused_and_samples_too_long_are_left_out(world, adaptable):
    client = world.client(Config(), Policy("rag", count=8, shown=8), adaptable)
    with pytest.raises(Reject, match="the model takes"):
        client.answer_conversation(asked("a" * 400), SHORT)
    found = client.answer_conversation(asked("a" * 300), SHORT)
    assert found.decision.branch == "direct" and found.prompt_tokens == 300
    assert client.answer_conversation(asked(QUESTIONS[0]), SHORT).prompt_tokens > len(QUESTIONS[0]) + 20


def test_a_stop_string_ends_an_answer(world, adaptable):
    client = world.client(Config(), Policy("direct"), adaptable)
    whole = client.answer_conversation(asked("a"), Settings(max_tokens=12)).text
    stop = whole[4:6]
    found = client.answer_conversation(asked("a"), Settings(max_tokens=12, stops=(stop,)))
    assert found.text == whole[: whole.find(stop)] and found.finish == "stop"


def test_the_models_own_likelihood_prefers_what_the_model_says(world, adaptable):
    reward = SelfLikelihood(world.model, world.prompts)
    said = (
        world.client(Config(), Policy("direct"), adaptable)
        .answer_conversation(asked("a\n"), Settings(max_tokens=8))
        .text
    )
    own, other, none = reward.score("a", [said, "zebra quartz", ""])
    assert own > other and none == -100.0


@given(scores=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_data_reduction_keeps_exactly_the_scores_above_the_lower_of_mean_and_median(scores):
    import statistics

    bound = min(statistics.fmean(scores), statistics.median(scores))
    wanted = [i for i, score in enumerate(scores) if score > bound + 1e-15]
    if not any(abs(score - bound) < 1e-12 and score != bound for score in scores):
        assert indices_above_min_of_mean_and_median(scores) == (wanted or list(range(len(scores))))


def test_training_stops_when_its_seconds_are_over(world):
    made = world.adaptable(seconds=0.0)
    trained = made.reset_and_train([Sample(q, answer_of(q)) for q in QUESTIONS[:4]])
    made.close()
    assert trained.stopped and trained.losses == ()


def test_the_model_is_as_it_was_once_the_adapters_are_off(world):
    before = {name: type(module) for name, module in world.model.named_modules()}
    world.adaptable().close()
    assert {name: type(module) for name, module in world.model.named_modules()} == before


class Renewed(Local):
    """A base whose version a test changes."""

    version = "one"

    def facts(self):
        return replace(super().facts(), version=self.version)

    def retrieve(self, vector, count):
        return replace(super().retrieve(vector, count), version=self.version)


def test_what_a_client_kept_of_an_older_base_is_not_used_after_a_restart(world, adaptable, tmp_path, monkeypatch):
    def client():
        return world.client(Config(), TTT, adaptable, Renewed(world.base), near=(0.999, 0.999), folder=tmp_path)

    client().answer_conversation(asked(QUESTIONS[0]), SHORT)
    assert client().answer_conversation(asked(QUESTIONS[0]), SHORT).decision.adapter_hit
    monkeypatch.setattr(Renewed, "version", "two")
    found = client().answer_conversation(asked(QUESTIONS[0]), SHORT).decision
    assert not found.adapter_hit and not found.list_hit and found.steps > 0


def test_a_client_whose_questions_all_hit_hears_of_a_new_base_within_a_minute(world, adaptable, monkeypatch):
    client = world.client(Config(), TTT, adaptable, Renewed(world.base), near=(0.999, 0.999))
    client.answer_conversation(asked(QUESTIONS[0]), SHORT)
    monkeypatch.setattr(Renewed, "version", "two")
    assert client.answer_conversation(asked(QUESTIONS[0]), SHORT).decision.adapter_hit
    monkeypatch.setattr("effc.compiler.apps.rttc.guided._MINUTE", 0.0)
    assert not client.answer_conversation(asked(QUESTIONS[0]), SHORT).decision.adapter_hit


def test_one_who_leaves_while_it_trains_ends_the_training(world, adaptable):
    steps = []

    def stopped():
        steps.append(1)
        return len(steps) > 4

    with pytest.raises(Cancelled):
        client = world.client(Config(), TTT, adaptable)
        client.answer_conversation(asked(QUESTIONS[0]), Settings(max_tokens=6), is_cancelled=stopped)
    assert len(steps) < 8 and len(client.states) == 0
    assert client.answer_conversation(asked(QUESTIONS[0]), SHORT).decision.steps == 2  # and the next one trains as ever
