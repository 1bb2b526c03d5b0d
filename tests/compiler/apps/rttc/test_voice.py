"""Answers by the native engine are those of PyTorch, without adapters and under any."""

from pathlib import Path

import pytest
import torch
from effc.compiler.apps.rttc.adaptation import AdaptableModel, AdapterSettings
from effc.compiler.apps.rttc.attachment import default_attachment_paths
from effc.compiler.apps.rttc.generation import Settings, generate_one
from effc.compiler.apps.rttc.native_generator import MAX_ERROR, open_native_generator, relative_logit_error
from effc.compiler.apps.rttc.policy import Policy
from effc.compiler.apps.rttc.reward import SelfLikelihood
from effc.compiler.apps.rttc.sample import Sample
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.rows.forward import last_logits, logits
from effc.compiler.runtimes.native.adapters import (
    Factors,
    low_rank_updates_behind_layers,
    low_rank_updates_of_linears,
    unsupported_adapter,
)
from effc.compiler.runtimes.native.emission import native_artifact_facts
from effc.compiler.runtimes.native.plan_files import write_plan
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.syntax.diagnostics import Reject

from tests import grids, tiny
from tests.compiler.apps.rttc.conftest import QUESTIONS, Config, World, answer_of

IDS = [5, 17, 33, 70, 9, 41, 22, 64]


def written(model, folder: Path) -> Path:
    folder.mkdir()
    write_plan(Reader(capture(model), "bf16").build_plan(), folder, native_artifact_facts(model, "bf16"))
    return folder


def voice_of(model, folder: Path, kind: str):
    written(model, folder)
    regime = AdapterSettings(kind=kind, rank=4, alpha=8.0)
    adaptable = AdaptableModel(model, None, default_attachment_paths(model, kind), regime, lambda text: IDS)
    return open_native_generator(folder, adaptable, threads=1), adaptable


@pytest.mark.parametrize("kind", ["lora", "reft"])
@pytest.mark.parametrize("name", grids.wide(tiny.NAMES, tiny.STAND))
def test_under_any_adapters_the_engine_computes_what_pytorch_does(name, kind, tmp_path):
    model = tiny.model(name)
    generator, adaptable = voice_of(model, tmp_path / "native", kind)
    row = torch.tensor([IDS])
    bare = logits(generator.bare, row)
    assert torch.equal(logits(generator.adapted, row), bare)  # adapters in their first state change nothing
    assert relative_logit_error(generator, adaptable, IDS) < MAX_ERROR
    assert torch.equal(logits(generator.bare, row), bare)
    moved = (logits(generator.adapted, row) - bare).square().mean().sqrt() / bare.square().mean().sqrt()
    assert moved > 0.2, "adapters that change so little show nothing"
    generator.put(adaptable.state())
    assert torch.equal(logits(generator.adapted, row), bare)  # nothing is left of the state before


def test_what_was_computed_under_some_adapters_is_gone_on_with_under_those_alone(tmp_path):
    generator, adaptable = voice_of(tiny.model("llama"), tmp_path / "native", "lora")
    draw, first = torch.Generator().manual_seed(0), adaptable.state()
    states = [{n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in first.items()} for _ in range(2)]
    row = torch.tensor([3 * IDS])
    whole = []
    for state in states:
        generator.put(state)
        whole.append(logits(generator.adapted, row)[:, -1])
    assert (whole[0] - whole[1]).abs().max() > 0.1
    read, run = [], generator.bare.engine.run
    generator.bare.engine.run = lambda ids, *more: read.append(len(ids)) or run(ids, *more)
    for number in (0, 1, 0, 1):
        generator.put(states[number])
        assert torch.allclose(last_logits(generator.adapted, row, 1)[:, 0], whole[number], atol=1e-4)
    assert read == [1, 1, 1, 1]


def test_a_place_that_the_plan_does_not_have_is_refused_by_name(tmp_path):
    plan = Reader(capture(tiny.model("llama")), "bf16").build_plan().to_json()
    factors = {"model.layers.7.mlp": Factors(torch.zeros(4, 8), torch.zeros(8, 4))}
    for updates, words in (
        (low_rank_updates_of_linears, "no linear step"),
        (low_rank_updates_behind_layers, "other results than hidden states"),
    ):
        with pytest.raises(Reject) as refused:
            updates(plan, factors)
        told = refused.value.diagnostics[0]
        assert told.fault == unsupported_adapter and "`model.layers.7.mlp`" in told.message and words in told.message


@pytest.fixture(scope="module")
def spoken(world: World, tmp_path_factory):
    return written(world.model, tmp_path_factory.mktemp("voice") / "native")


@pytest.mark.parametrize("kind", ["", "lora", "reft"])
def test_every_token_of_a_native_answer_is_one_that_pytorch_would_have_taken(world, spoken, kind):
    adaptable = world.adaptable(kind=kind or "lora", lr=2e-2 if kind == "reft" else 5e-3)
    generator = open_native_generator(spoken, adaptable, threads=1)
    try:
        if kind:
            adaptable.reset_and_train([Sample(q, answer_of(q)) for q in QUESTIONS[:4]])
            generator.put(adaptable.state())
        for question in QUESTIONS[:3]:
            asked = world.prompts.tokenize_conversation([{"role": "user", "content": question}])
            row = (generator.adapted if kind else generator.bare).generate(torch.tensor([asked]), max_new_tokens=12)
            with torch.no_grad():
                values = world.model(row).logits[0, len(asked) - 1 : -1]
            said = values.gather(1, row[0, len(asked) :, None])[:, 0]
            assert (values.max(-1).values - said).max() < 0.1 * values.std(), "PyTorch finds a token of it worse"
    finally:
        adaptable.close()


@pytest.mark.parametrize("branch", ["direct", "rag", "ttt"])
@pytest.mark.slow
def test_a_client_with_a_voice_decides_and_answers_as_one_without(world, spoken, branch):
    adaptable = world.adaptable()
    client = world.client(Config(), Policy(branch, count=4, shown=2), adaptable)
    asked = [{"role": "user", "content": QUESTIONS[1]}]
    try:
        plain = client.answer_conversation(asked, Settings(max_tokens=1))
        client.generator = open_native_generator(spoken, adaptable, threads=1)
        found = client.answer_conversation(asked, Settings(max_tokens=1))
    finally:
        adaptable.close()
    assert found.text == plain.text and found.prompt_tokens == plain.prompt_tokens
    assert (found.decision.branch, found.decision.steps) == (plain.decision.branch, plain.decision.steps) != ("", 0)


def test_a_cached_state_answers_natively_as_the_training_did(world, spoken):
    adaptable = world.adaptable(kind="reft", lr=2e-2)
    client = world.client(Config(), Policy("ttt", count=4, shown=2), adaptable, near=(2, 0.999))
    client.generator = open_native_generator(spoken, adaptable, threads=1)
    try:
        first, _, again = (
            client.answer_conversation([{"role": "user", "content": QUESTIONS[n]}], Settings(max_tokens=8))
            for n in (3, 4, 3)
        )
    finally:
        adaptable.close()
    assert again.decision.adapter_hit and again.decision.steps == 0 and again.text == first.text


def test_states_take_turns_and_each_answers_as_it_did_however_many_came_between(world, spoken):
    adaptable = world.adaptable()
    generator = open_native_generator(spoken, adaptable, threads=1)
    first, row = adaptable.state(), torch.tensor([IDS])
    draw = torch.Generator().manual_seed(0)
    states = [{n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in first.items()} for _ in range(7)]

    def told(state):
        generator.put(state)
        return logits(generator.adapted, row)

    wanted = [told(state) for state in states]
    adaptable.close()
    assert len({float(w.sum()) for w in wanted}) == 7
    for at in (6, 0, 6, 3, 0, 5, 6):
        assert torch.equal(told(states[at]), wanted[at])


def test_the_engines_own_likelihood_is_that_of_pytorch(world, spoken):
    generator = open_native_generator(spoken, None, threads=1)
    answers = ["It is red.", "It is of no colour", "zebra"]
    own = SelfLikelihood(generator.bare, world.prompts).score(QUESTIONS[0], answers)
    assert own == pytest.approx(SelfLikelihood(world.model, world.prompts).score(QUESTIONS[0], answers), abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_with_drafts_of_its_prompt_is_the_one_without(world, spoken, temperature):
    adaptable = world.adaptable()
    generator = open_native_generator(spoken, adaptable, threads=1)
    adaptable.close()
    ids = world.prompts.tokenize_conversation([{"role": "user", "content": " ".join([QUESTIONS[0]] * 3)}])
    settings = Settings(max_tokens=60, temperature=temperature, seed=7)
    assert generator.bare.draft_tokens == generator.adapted.draft_tokens > 0

    def answers():
        voices = (generator.bare, generator.adapted)
        return [generate_one(voice, world.prompts, ids, settings, lambda: False) for voice in voices]

    with_drafts = answers()
    generator.disable_speculation()
    assert answers() == with_drafts and generator.bare.draft_tokens == generator.adapted.draft_tokens == 0
