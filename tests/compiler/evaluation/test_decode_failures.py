"""A decode step that fails: whose fault it is taken for."""

import pytest
import torch
from effc.compiler.evaluation.timing import _failure_as_diagnostic, no_cache
from effc.compiler.models.checkpoints.origin import _config_integer
from effc.dsl.syntax.diagnostics import Reject
from effc.kernels.native import KernelError


def failing(error: Exception) -> None:
    with _failure_as_diagnostic(torch.nn.Linear(1, 1)):
        raise error


def test_a_forward_that_takes_no_single_token_is_said_to_have_no_cache():
    with pytest.raises(Reject) as rejection:
        failing(IndexError("index 1 is out of bounds"))
    assert rejection.value.diagnostics[0].fault is no_cache


@pytest.mark.parametrize(
    "error", [KernelError("sizes"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")]
)
def test_a_kernel_that_refuses_and_want_of_memory_stay_what_they_are(error):
    with pytest.raises(type(error), match=str(error)[:10]):
        failing(error)


def test_the_vocabulary_of_an_encoder_that_hears_is_not_that_of_a_models_rows():
    text = {"vocab_size": 50, "max_position_embeddings": 64}
    assert _config_integer({"encoder": text, "decoder": text}, "vocab_size") == 50
    assert _config_integer({"encoder": {"vocab_size": 32, "conv_dim": [8]}, "decoder": text}, "vocab_size") is None
