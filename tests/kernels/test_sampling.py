"""Sampling against the filters of transformers."""

import pytest
import torch
from effc.kernels import levels
from effc.kernels.native import KernelError
from effc.kernels.sampling import Sampler
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def filtered(logits, tokens, temperature, top_k, top_p, penalty) -> torch.Tensor:
    """Probabilities of all tokens, by transformers."""
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    steps.append(TopPLogitsWarper(top_p))
    return steps(tokens[None], logits[None].clone())[0].softmax(-1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([0.2, 0.7, 0.95, 1.0]),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_only_tokens_that_transformers_keeps_are_drawn_and_all_of_them(seed, temperature, top_k, top_p, penalty):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, generator=generator) * 2
    tokens = torch.randint(0, 40, (6,), generator=generator)
    kept = filtered(logits, tokens, temperature, top_k, top_p, penalty)
    sampler = Sampler(temperature, top_k, top_p, penalty, seed)
    counts = torch.zeros(40)
    for _ in range(600):
        counts[sampler.sample_next_token(logits, tokens)] += 1
    assert not counts[kept == 0].any()
    spread = (kept * (1 - kept) / 600).sqrt()
    assert ((counts / 600 - kept).abs() <= 5 * spread + 2 / 600).all()  # five deviations: 1 in 10**6 draws


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    top_k=st.sampled_from([0, 3, 300]),
    top_p=st.sampled_from([0.05, 0.9, 1.0]),
    coarse=st.booleans(),
)
def test_of_a_wide_vocabulary_the_same_tokens_are_drawn_at_every_level(seed, spread, top_k, top_p, coarse):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3001, generator=generator) * spread
    logits = logits.bfloat16().float() if coarse else logits  # many are equal
    tokens = torch.randint(0, 3001, (9,), generator=generator)
    kept = filtered(logits, tokens, 0.9, top_k, top_p, 1.2)
    drawn = set()
    for name in levels.available_levels():
        sampler = Sampler(0.9, top_k, top_p, 1.2, seed)
        with levels.at_forced_level(name):
            drawn.add(tuple(sampler.sample_next_token(logits, tokens) for _ in range(20)))
            assert Sampler(0.0).sample_next_token(logits) == int(logits.argmax())
    (row,) = drawn
    # Of equals at the border of top_p transformers keeps others: as likely, and as many.
    assert kept[list(row)].all() or coarse
    assert logits_of(row, logits, tokens).min() >= logits_of(kept.nonzero()[:, 0], logits, tokens).min() - 1e-6


def logits_of(chosen, logits, tokens):
    penalised = RepetitionPenaltyLogitsProcessor(1.2)(tokens[None], logits[None].clone())[0]
    return penalised[torch.as_tensor(chosen)]


def test_temperature_zero_takes_the_first_of_the_most_likely():
    assert Sampler(0.0).sample_next_token(torch.tensor([1.0, 3.0, 3.0, -2.0])) == 1
    assert Sampler(0.0, repetition_penalty=2.0).sample_next_token(torch.tensor([1.0, 3.0, 2.5]), torch.tensor([1])) == 2
    assert Sampler(0.0, repetition_penalty=2.0).sample_next_token(torch.tensor([-1.0, -1.5]), torch.tensor([0])) == 1


def test_the_same_seed_gives_the_same_tokens_and_another_others():
    logits = torch.zeros(1000)
    rows = [
        [s.sample_next_token(logits) for _ in range(20)] for s in (Sampler(seed=1), Sampler(seed=1), Sampler(seed=2))
    ]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("logits", [[float("nan"), 1.0], [float("inf"), 1.0], [float("-inf")] * 2])
def test_logits_that_are_no_numbers_are_refused(logits):
    with pytest.raises(KernelError, match="NaN or infinite"):
        Sampler().sample_next_token(torch.tensor(logits))


def test_masked_tokens_are_never_drawn():
    logits = torch.full((50,), float("-inf"))
    logits[[3, 7]] = 0.0
    sampler = Sampler(temperature=5.0)
    assert {sampler.sample_next_token(logits) for _ in range(100)} == {3, 7}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(KernelError, match=next(iter(settings))):
        Sampler(**settings)


def test_a_seen_token_outside_the_vocabulary_is_refused():
    with pytest.raises(KernelError):
        Sampler(repetition_penalty=1.5).sample_next_token(torch.zeros(4), torch.tensor([4]))
