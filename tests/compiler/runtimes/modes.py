"""Modes of transformers' `generate`, compared between a model and what an artifact of it opens as."""

import torch

DRAWN = {"do_sample": True, "temperature": 1.7, "top_k": 40, "top_p": 0.9}
MODES = {
    "greedy": {},
    "n-grams": {"no_repeat_ngram_size": 2, "bad_words_ids": [[5], [7, 8]], "suppress_tokens": [9]},
    "drawn": DRAWN,
    "drawn, with a penalty": {**DRAWN, "repetition_penalty": 1.3, "min_p": 0.02},
    "several of each": {**DRAWN, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "length_penalty": 0.7},
    "beams of each": {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
    "drawn beams": {**DRAWN, "num_beams": 3},
    "uncached beams": {"num_beams": 2, "use_cache": False},
}
ASSISTED = {"drafts of the prompt": {"prompt_lookup_num_tokens": 3}}


def seeded(model, ids, **options):
    torch.manual_seed(4)
    return model.generate(ids, **{"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": [2, 7, 90], **options})


def assert_generates_alike(original, opened):
    """Every mode gives the same tokens, of a batch that is padded at the left, and of one row with drafts."""
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for name, mode in MODES.items():
        expected, actual = (seeded(model, ids, attention_mask=mask, **mode) for model in (original, opened))
        assert torch.equal(actual, expected), name
    row = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]])
    for name, mode in ASSISTED.items():
        expected, actual = (seeded(model, row, **mode) for model in (original, opened))
        assert torch.equal(actual, expected), name
