"""Ids that a model does not know: of a translator with two vocabularies, each half of a row is held to its own."""

import pytest
import torch
from effc.compiler.models.checkpoints.origin import Origin
from effc.compiler.plugin.row_checks import refuse_rows_beyond_model
from effc.dsl.syntax.diagnostics import Reject


def origin(**config):
    return Origin("model", config, None, "model", lambda: None, lambda: None, lambda: None)


MARIAN = {"vocab_size": 128, "decoder_vocab_size": 90}
FSMT = {"src_vocab_size": 128, "tgt_vocab_size": 90}


@pytest.mark.parametrize("config", [MARIAN, FSMT])
@pytest.mark.parametrize("source, target, known", [(127, 89, ""), (128, 5, "has 128"), (5, 90, "has 90")])
def test_a_source_and_its_target_have_ids_of_their_own(source, target, known, config):
    rows = torch.tensor([[source, 1, target, 1]])
    own = origin(**config)
    if not known:
        return refuse_rows_beyond_model(rows, "rows", own)
    with pytest.raises(Reject, match=known):
        refuse_rows_beyond_model(rows, "rows", own)
