"""Knowledge bases: exact search, diverse selection against its definition, files that are whole or refused."""

import json
import shutil

import pytest
import torch
from effc.compiler.apps.rttc.knowledge import build_knowledge_base, open_knowledge_base, refuse_other_embedder
from effc.compiler.apps.rttc.sample import parse_sample, read_samples, without_duplicate_texts
from effc.compiler.apps.rttc.selection import nearest_indices, select_by_posterior_variance
from effc.compiler.apps.rttc.targets.rttc import Rttc
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import given
from hypothesis import strategies as st

from tests import worlds
from tests.compiler.apps.rttc.conftest import QUESTIONS, write_samples


def unit(seed, rows, width):
    made = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=-1)


@given(seed=st.integers(0, 99), rows=st.integers(1, 40), count=st.integers(1, 50))
def test_the_nearest_are_those_of_a_full_sort(seed, rows, count):
    vectors, query = unit(seed, rows, 8), unit(seed + 1000, 1, 8)[0]
    wanted = sorted(range(rows), key=lambda i: -float(vectors[i] @ query))[:count]
    assert nearest_indices(query, vectors, count) == wanted


@given(seed=st.integers(0, 99), rows=st.integers(2, 12))
def test_each_sample_of_a_diverse_selection_lowers_the_variance_at_the_query_most(seed, rows):
    """Against the closed form: k(q, q) - k(q, X) (K(X, X) + noise)^-1 k(X, q)."""
    vectors, query, noise = unit(seed, rows, 5).double(), unit(seed + 1000, 1, 5)[0].double(), 0.01

    def variance(chosen):
        x = vectors[chosen]
        inner = torch.linalg.solve(x @ x.T + noise * torch.eye(len(chosen), dtype=torch.float64), x @ query)
        return float(query @ query - (x @ query) @ inner)

    chosen = select_by_posterior_variance(query.float(), vectors.float(), min(4, rows), noise)
    for at in range(len(chosen)):
        rest = [i for i in range(rows) if i not in chosen[:at]]
        best = min(variance([*chosen[:at], i]) for i in rest)
        assert variance(chosen[: at + 1]) == pytest.approx(best, abs=1e-6)
    assert len(set(chosen)) == len(chosen)


def test_a_diverse_selection_takes_no_copies_before_something_new():
    vectors = torch.nn.functional.normalize(torch.tensor([[1, 0.1, 0], [1, 0.1, 0.001], [1, -0.4, 0]]), dim=-1)
    query = torch.tensor([1.0, 0.0, 0.0])
    assert (
        nearest_indices(query, vectors, 2) == [0, 1] and set(select_by_posterior_variance(query, vectors, 2)) == {0, 2}
    ) or set(select_by_posterior_variance(query, vectors, 2)) == {1, 2}


def test_a_question_of_the_base_finds_itself(world):
    for question in QUESTIONS[::5]:
        query = world.base.center_and_normalize(world.embedder.embed([question])[0])
        found = world.base.search(query, 3, "nearest")
        assert found[0].sample.question == question and found[0].score == pytest.approx(1, abs=1e-4)
        assert len(world.base.search(query, 999)) == len(QUESTIONS)


def test_a_base_is_the_same_when_opened_and_its_version_follows_its_content(world, tmp_path):
    again = open_knowledge_base(world.folder / "kb")
    assert torch.equal(again.vectors, world.base.vectors) and again.version == world.base.version
    same = build_knowledge_base([write_samples(tmp_path / "a.jsonl")], world.embedder, tmp_path / "a")
    other = build_knowledge_base([write_samples(tmp_path / "b.jsonl", QUESTIONS[1:])], world.embedder, tmp_path / "b")
    assert same.version == world.base.version != other.version


@pytest.mark.parametrize("name", ["kb.json", "samples.jsonl", "vectors.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_base_that_is_not_whole_is_refused(world, tmp_path, name, harm):
    base = build_knowledge_base([write_samples(tmp_path / "kb.jsonl")], world.embedder, tmp_path / "kb")
    file, data = tmp_path / "kb" / name, (tmp_path / "kb" / name).read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        at = len(data) // 2
        file.write_bytes(data[:at] if harm == "cut" else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    if name == "kb.json" and harm == "flip":
        try:
            found = open_knowledge_base(tmp_path / "kb")
        except Reject:
            return
        assert torch.equal(found.vectors, base.vectors)  # the bit was of a count or of the version
    else:
        with pytest.raises(Reject, match="no whole knowledge base"):
            open_knowledge_base(tmp_path / "kb")


def test_samples_that_are_the_same_count_once_and_the_evaluations_own_are_left_out(world, tmp_path):
    file = write_samples(tmp_path / "kb.jsonl", [*QUESTIONS, *QUESTIONS[:5]])
    base = build_knowledge_base(
        [file], world.embedder, tmp_path / "kb", evaluation_questions=[QUESTIONS[2].upper(), f"{QUESTIONS[7]} "]
    )
    asked = {sample.question for sample in base.samples}
    assert len(asked) == len(base.samples) and not asked & {QUESTIONS[2], QUESTIONS[7]}
    assert base.dropped == len(QUESTIONS) - len(base.samples) >= 2


@pytest.mark.parametrize("emitted", [False, True])
def test_a_build_that_was_killed_goes_on(world, tmp_path, monkeypatch, emitted):
    """Also one of a recipe, whose folder is another one when it is compiled again."""
    from effc.compiler.apps.rttc import knowledge

    class Killed(Exception):
        pass

    class Dying:
        identity, width = world.embedder.identity, world.embedder.width

        def __init__(self, lives):
            self.lives, self.texts = lives, 0

        def embed(self, texts):
            self.lives -= 1
            if self.lives < 0:
                raise Killed
            self.texts += len(texts)
            return world.embedder.embed(texts)

    monkeypatch.setattr(knowledge, "_SHARD", 8)  # what a vector's last bits are depends on what is embedded beside it
    file = write_samples(tmp_path / "kb.jsonl")
    whole = build_knowledge_base([file], world.embedder, tmp_path / "whole")
    target, ctx = Rttc(path="app", knowledge="kb.jsonl", policy="rag"), worlds.context(tmp_path)

    def made(embedder, folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        if emitted:
            return target._build_base(tmp_path / folder / "kb", embedder, ctx)
        return build_knowledge_base([file], embedder, tmp_path / "kb")

    with pytest.raises(Killed):
        made(Dying(2), "first")
    shutil.rmtree(tmp_path / "first")
    second = Dying(99)
    base = made(second, "second")
    assert second.texts == len(QUESTIONS) - 16 and base.version == whole.version
    assert not list(tmp_path.rglob(".kb*")) and not list(tmp_path.rglob("building"))


def test_a_base_of_another_embedder_or_a_vector_of_another_width_is_refused(world):
    class Other:
        identity, width = "other", 3

    with pytest.raises(Reject, match="embedded by another model"):
        refuse_other_embedder(world.base, Other())
    with pytest.raises(Reject, match="a query has 3 numbers"):
        world.base.search(torch.ones(3), 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2"),
        ("[]", "neither"),
        ('{"text": ""}', "neither"),
        ('{"question": "a"}', "neither"),
        (json.dumps({"text": "a" * 9000}), "at most 8192"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 9999, "line 2"),
    ],
)
def test_a_line_that_is_no_sample_is_named(tmp_path, line, words):
    (tmp_path / "kb.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(Reject, match="line 2 of") as refused:
        list(read_samples(tmp_path / "kb.jsonl"))
    assert words in refused.value.diagnostics[0].message


def test_paragraphs_of_a_text_are_samples(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo,\nstill two.\n\n\n")
    assert [s.text for s in read_samples(tmp_path / "a.txt")] == ["One.", "Two,\nstill two."]
    assert len(without_duplicate_texts([parse_sample({"text": "A  b"}), parse_sample({"text": "a B"})])) == 1
