"""Tokens that are verified at once: what the engine computes for several of a sequence is what it does one by one."""

import pytest
import torch
from effc.kernels import packed

from tests.kernels.engine_plans import llama
from tests.kernels.test_engine import engine, ids_of


@pytest.mark.parametrize("kernel", packed.KINDS)
@pytest.mark.parametrize("window", [None, 7])
def test_steady_logits_of_tokens_at_once_are_those_one_by_one_also_behind_rejected_ones(kernel, window, level):
    built = llama(kernel, hidden=64, heads=4, kv=2, window=window)
    ids = ids_of(built, 100)
    single, several = (engine(built, threads, batch_invariant=True) for threads in (1, 2))
    single.run(ids[:20], [0] * 20, [])
    several.run(ids[:20], [0] * 20, [])
    at = 20
    for count in (2, 3, 1, 5, 4, 8, 1, 11, 16, 17):
        rejected = ids_of(built, count, seed=count)
        several.run(rejected, [0] * count)
        several.forget(0, at)
        together = several.run(ids[at : at + count], [0] * count)
        apart = torch.cat([single.run([token], [0]) for token in ids[at : at + count]])
        assert torch.equal(together, apart), (count, at)
        at += count
