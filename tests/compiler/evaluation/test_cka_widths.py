"""Linear CKA compares states of the original with narrower ones, and with no wider ones."""

import pytest
import torch
from effc.compiler.evaluation.similarity import linear_cka
from effc.compiler.models.rows.encoder_states import pooled_state_batches

from tests import tiny, worlds

ROWS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def states():
    return lambda model: next(pooled_state_batches(model, ROWS, "mean"))


def test_narrower_states_have_a_similarity_and_wider_ones_are_refused(states):
    wide, narrow = (tiny.model("llama", hidden_size=n, num_attention_heads=2).model for n in (32, 16))
    of_wide, of_narrow = ({"t": s.tokens, "v": s.pooled} for s in (states(wide), states(narrow)))
    assert linear_cka(wide, ROWS, of_wide, "mean").tokens == pytest.approx(1.0)
    assert 0 < linear_cka(narrow, ROWS, of_wide, "mean").tokens < 1
    assert worlds.slug(lambda: linear_cka(wide, ROWS, of_narrow, "mean")) == "other-vocabulary"
