"""Log-probabilities of continuations, of which those that differ in their last token share a forward."""

import pytest
import torch
from effc.compiler.models.rows.forward import continuation_logprobs
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 60


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def logprob_alone(model, tokens, begin):
    with torch.no_grad():
        log_probs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(log_probs[i - 1, tokens[i]].item() for i in range(begin, len(tokens)))


tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)


@given(requests=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_every_continuation_has_the_log_probability_that_it_has_alone(model, requests):
    rows = [([*context, *more], len(context)) for context, more in requests]
    rows += [([*context, *more[:-1], 3], len(context)) for context, more in requests]  # share what is read
    expected = [logprob_alone(model, *row) for row in rows]
    assert continuation_logprobs(model, rows) == pytest.approx(expected, abs=1e-3)  # float32


def test_yes_and_no_behind_one_question_are_one_row_without_the_answer(model):
    shapes = []
    hook = model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    questions = [[5, 6, 7, 8], [9, 10, 11, 12]]
    continuation_logprobs(model, [([*question, answer], 4) for question in questions for answer in (1, 2)])
    hook.remove()
    assert shapes == [(2, 4)]
