"""Rows that a model writes itself."""

import json
from dataclasses import replace

import pytest
import torch
from effc.compiler.inputs.data.generated import Generated
from effc.compiler.inputs.sources.config import Config
from effc.compiler.inputs.sources.hf import Hf
from effc.compiler.inputs.sources.zoo import Zoo
from effc.dsl.syntax.diagnostics import Reject

from tests import tiny, worlds

torch.set_num_threads(1)


@pytest.fixture
def ctx(tmp_path):
    """A context of a random model with a tokenizer."""
    worlds.tokenizer(worlds.llama(tmp_path / "model"))
    return worlds.context(tmp_path, Hf(name=str(tmp_path / "model")).resolve(worlds.context(tmp_path)))


def rows(word, ctx) -> torch.Tensor:
    return torch.stack(list(word.rows(ctx.tokenizer, ctx)))


def test_what_a_model_writes_is_likelier_to_it_than_noise_and_the_same_every_time(tmp_path):
    """A model that knows one text writes that text."""
    made = worlds.context(tmp_path, Zoo(name="tiny-llama").resolve(worlds.context(tmp_path)))
    written = rows(Generated(count=6, length=24, seed=1), made)
    assert written.shape == (6, 24) and len(set(map(tuple, written.tolist()))) == 6
    assert torch.equal(written, rows(Generated(count=6, length=24, seed=1), worlds.context(tmp_path, made.origin)))
    assert not torch.equal(written, rows(Generated(count=6, length=24, seed=2), made))
    model, noise = made.origin.load(), torch.randint(made.origin.token_id_count, written.shape)
    with torch.no_grad():
        own, other = (model(input_ids=r, labels=r).loss.item() for r in (written, noise))
    assert own < 0.6 * other


def test_writing_leaves_the_random_numbers_of_the_run_alone(ctx):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rows(Generated(count=2, length=6, seed=1), ctx)
    assert torch.equal(torch.rand(3), expected)


def test_a_colder_model_repeats_itself_more(ctx):
    hot, cold = (rows(Generated(count=8, length=32, temperature=t, seed=1), ctx) for t in (3.0, 0.05))
    assert len(cold.unique()) < len(hot.unique())


def test_a_model_that_writes_nothing_is_refused(tmp_path):
    config = tiny.config("bert").to_dict() | {"architectures": ["BertModel"]}
    (tmp_path / "bert.json").write_text(json.dumps(config))
    made = worlds.context(tmp_path, Config(path="bert.json").resolve(worlds.context(tmp_path)))
    with pytest.raises(Reject, match="writes no text"):
        list(Generated(count=1, length=4).rows(None, made))


def test_a_model_that_predicts_no_number_writes_nothing(tmp_path):
    made = worlds.context(tmp_path, Zoo(name="tiny-llama").resolve(worlds.context(tmp_path)))
    broken = made.origin.load()
    broken.model.norm.weight.data.fill_(float("nan"))
    made.origin = replace(made.origin, load=lambda: broken)
    with pytest.raises(Reject, match=r"not-a-number.*its own text"):
        list(Generated(count=2, length=8).rows(None, made))
