"""Prompts of so many rows that each thread multiplies rows of its own, and not all rows by outputs of its own."""

import pytest
import torch
from effc.kernels import packed

from tests.kernels.engine_oracle import wanted_logits
from tests.kernels.engine_plans import gpt2, llama
from tests.kernels.test_engine import KERNELS, assert_near, engine, ids_of, share_of

FIRST, SECOND = 290, 127  # tokens of two texts: their boundary is in the middle of a tile of keys


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kernel", sorted(set(packed.KINDS) - {"dense_linear_int4"}))
def test_two_long_texts_in_one_call_give_what_torch_gives(kernel, threads, monkeypatch):
    monkeypatch.setattr("effc.kernels.engine.usable_cores", lambda: 64)
    built = llama(kernel, context=300)
    first, second = ids_of(built, FIRST + 1), ids_of(built, SECOND + 1, seed=1)
    own = engine(built, threads, max_sequences=2)
    logits = own.run(first[:-1] + second[:-1], [0] * FIRST + [1] * SECOND)
    following = own.run([first[-1], second[-1]], [0, 1])
    for text, found, last in ((first, logits[:FIRST], 0), (second, logits[FIRST:], 1)):
        wanted = wanted_logits(built, text)
        assert_near(found, wanted[:-1], share_of(kernel))
        assert_near(following[last : last + 1], wanted[-1:], share_of(kernel))


@pytest.mark.parametrize("make", [lambda: llama(context=300, parallel="neox"), lambda: gpt2(context=300)])
def test_what_follows_a_product_is_done_to_the_rows_of_each_thread(make, level):
    built = make()
    ids = ids_of(built, 280)
    assert_near(engine(built, 2).run(ids, [0] * 280), wanted_logits(built, ids))


def test_only_the_rows_of_wanted_tokens_go_on_behind_the_last_attention():
    built = llama(context=300)
    ids, wanted = ids_of(built, 300), [3, 150, 299]
    assert_near(engine(built, 2).run(ids, [0] * 300, wanted), wanted_logits(built, ids)[wanted])


@pytest.mark.parametrize("kernel", ["dense_linear_int4", "dense_linear_int8"])
def test_steady_logits_of_a_long_prompt_are_the_same_to_the_bit_with_any_threads(kernel, monkeypatch):
    monkeypatch.setattr("effc.kernels.engine.usable_cores", lambda: 64)
    built = llama(kernel, hidden=64, d=16, context=400)
    ids = ids_of(built, 390)
    alone = engine(built, 1, batch_invariant=True).run(ids, [0] * 390)
    for threads in (2, 3):
        assert torch.equal(engine(built, threads, batch_invariant=True).run(ids, [0] * 390), alone)


def test_a_text_whose_tokens_come_in_two_runs_of_one_call_has_the_keys_of_both():
    built = llama(context=400)
    text, other = ids_of(built, 301), ids_of(built, 20, seed=1)
    own, whole = engine(built, 2, max_sequences=2), engine(built, 2)
    runs = [*text[:137], *other, *text[137:300]]
    own.run(runs, [0] * 137 + [1] * 20 + [0] * 163, [])
    whole.run(text[:300], [0] * 300, [])
    assert_near(own.run(text[300:], [0]), whole.run(text[300:], [0]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_logits_of_a_token_do_not_depend_on_how_long_its_prompt_is(kernel, level):
    """Items of attention hold 16 rows at most, of 3 query heads of a token here: the last one has 1 to 16."""
    built = llama(kernel, context=100)
    ids, own = ids_of(built, 65), engine(built, 1)
    longest = own.run(ids, [0] * 65)
    for count in range(48, 65):
        own.forget(0)
        assert torch.equal(own.run(ids[:count], [0] * count), longest[:count]), count


@pytest.mark.parametrize("kernel", ["dense_linear", "dense_linear_int8"])
def test_no_row_is_left_alone_behind_a_chunk(kernel):
    """Linear layers take 512 rows at once, and a single one by sums of another order."""
    built = llama(kernel, context=600)
    ids, own = ids_of(built, 560), engine(built, 1)
    longest = own.run(ids, [0] * 560)
    for count in (513, 516, 528, 529):
        own.forget(0)
        assert torch.equal(own.run(ids[:count], [0] * count), longest[:count]), count
