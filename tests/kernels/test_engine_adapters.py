"""Low-rank updates of an engine's registers: a batch of several adapters and of none, against plain torch."""

import threading
import time

import pytest
import torch
from effc.kernels import packed
from effc.kernels.engine import Engine
from effc.kernels.engine_adapters import LowRankUpdate
from effc.kernels.native import KernelError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.engine_oracle import wanted_logits
from tests.kernels.engine_plans import Built, gpt2, llama, mamba2
from tests.kernels.test_engine import assert_near, engine, ids_of, share_of

KERNELS = [kernel for kernel in packed.KINDS if kernel != "dense_linear_int4"]


def halves(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers that bfloat16 has, as the engine keeps factors."""
    return tensor.bfloat16().float()


def lora(built: Built, rank: int = 3, seed: int = 0, every: int = 1) -> list[LowRankUpdate]:
    """Updates of every linear layer, or of each `every`-th one, as large as half of what the layer gives."""
    draws, updates = torch.Generator().manual_seed(seed), []
    for step in [step for step in built.plan["steps"] if step["op"] == "linear"][::every]:
        n, k = built.plan["registers"][step["to"]], built.plan["registers"][step["x"]]
        down, up = torch.randn(rank, k, generator=draws) * k**-0.5, torch.randn(n, rank, generator=draws) * 0.5
        updates.append(LowRankUpdate(step["x"], step["to"], halves(down), halves(up * rank**-0.5)))
    return updates


def intervention(built: Built, rank: int = 2, seed: int = 0) -> list[LowRankUpdate]:
    """An update with a bias of the last sum of every layer."""
    draws = torch.Generator().manual_seed(seed)
    updates = []
    for step in [step for step in built.plan["steps"] if step["op"] == "add"][1::2]:
        width = built.plan["registers"][step["to"]]
        down, up = torch.randn(rank, width, generator=draws) * width**-0.5, torch.randn(width, rank, generator=draws)
        updates.append(
            LowRankUpdate(step["to"], step["to"], halves(down), halves(up), torch.randn(rank, generator=draws))
        )
    return updates


def plain(updates: list[LowRankUpdate]) -> list[tuple]:
    return [(u.x, u.y, u.down, u.up, u.bias) for u in updates]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_prompt_and_tokens_with_an_adapter_give_what_torch_gives(make, kernel, level):
    built = make(kernel)
    ids, own, share = ids_of(built, 40), engine(built), 2 * share_of(kernel)
    for rank in (1, 3, 8, 21):
        updates = lora(built, rank, seed=rank)
        wanted, number = wanted_logits(built, ids, updates=plain(updates)), own.add_adapter(updates)
        assert float((wanted - wanted_logits(built, ids)).abs().max()) > 4 * share * float(wanted.abs().max())
        assert_near(own.run(ids[:33], [0] * 33, adapter_of_token=[number] * 33), wanted[:33], share)
        for i in range(33, 40):
            assert_near(own.run([ids[i]], [0], adapter_of_token=[number]), wanted[i : i + 1], share)
        own.forget(0)


@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_with_an_intervention_are_those_that_name_it(threads, level):
    built = llama()
    ids, own, updates = ids_of(built, 30), engine(built, threads), intervention(built)
    number, adapted = own.add_adapter(updates), [i < 3 or i > 26 for i in range(30)]
    wanted = wanted_logits(built, ids, updates=plain(updates), adapted=adapted)
    found = own.run(ids, [0] * 30, adapter_of_token=[number if flag else -1 for flag in adapted])
    assert_near(found, wanted, 2**-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_sequences_of_several_adapters_and_of_none_are_each_as_alone(kernel, threads):
    built = llama(kernel, hidden=80, heads=5, kv=5, context=700)
    own = engine(built, threads, max_sequences=8, batch_invariant=True)
    numbers = [-1, own.add_adapter(lora(built, 4, 1)), own.add_adapter(intervention(built, 2, 2)), -1]
    numbers.append(own.add_adapter(lora(built, 17, 3, every=3)))
    prompts = [ids_of(built, length, seed) for seed, length in enumerate((150, 260, 12, 5, 140))]
    together = own.run(
        [token for ids in prompts for token in ids],
        [sequence for sequence, ids in enumerate(prompts) for _ in ids],
        adapter_of_token=[number for number, ids in zip(numbers, prompts, strict=True) for _ in ids],
    ).split([len(ids) for ids in prompts])
    steps = [own.run([7] * 5, range(5), adapter_of_token=numbers) for _ in range(3)]
    for sequence, (ids, number) in enumerate(zip(prompts, numbers, strict=True)):
        alone = engine(built, 1, batch_invariant=True)
        for updates in (lora(built, 4, 1), intervention(built, 2, 2), lora(built, 17, 3, every=3)):
            alone.add_adapter(updates)
        named = None if number < 0 else [number] * len(ids)
        assert torch.equal(together[sequence], alone.run(ids, [0] * len(ids), adapter_of_token=named)), sequence
        for step in steps:
            assert torch.equal(step[sequence], alone.run([7], [0], adapter_of_token=named and named[:1])[0]), sequence


def test_an_adapter_acts_beside_states_too():
    built = mamba2()
    ids, own, updates = ids_of(built, 20), engine(built), lora(built)
    number = own.add_adapter(updates)
    assert_near(
        own.run(ids, [0] * 20, adapter_of_token=[number] * 20), wanted_logits(built, ids, updates=plain(updates)), 2**-5
    )


def test_the_rows_whose_logits_are_wanted_have_the_adapters_of_their_tokens():
    built = llama()
    ids, own = ids_of(built, 20), engine(built, max_sequences=2)
    numbers = [own.add_adapter(lora(built, 3, seed)) for seed in (0, 1)]
    pairs = [(token, sequence) for token in ids for sequence in (0, 1)]
    every, owners = [token for token, _ in pairs], [sequence for _, sequence in pairs]
    adapters = [numbers[sequence] for sequence in owners]
    whole = own.run(every, owners, adapter_of_token=adapters)
    own.forget(0), own.forget(1)
    assert_near(own.run(every, owners, [5, 38, 39], adapters), whole[[5, 38, 39]], 2**-7)


def test_an_adapter_that_is_removed_leaves_its_number_and_the_others():
    built = llama()
    ids, own = ids_of(built, 12), engine(built)
    first, second = (own.add_adapter(lora(built, 3, seed)) for seed in (0, 1))
    kept = own.run(ids, [0] * 12, adapter_of_token=[second] * 12)
    own.remove_adapter(first)
    with pytest.raises(KernelError, match=f"the engine has no adapter {first}"):
        own.run([1], [0], adapter_of_token=[first])
    own.forget(0)
    assert own.add_adapter(lora(built, 9, 2)) == first
    assert torch.equal(own.run(ids, [0] * 12, adapter_of_token=[second] * 12), kept)


def test_a_batch_without_adapters_is_what_an_engine_without_any_computes():
    built = llama(hidden=80, heads=5, kv=5, context=700)
    ids, own, bare = ids_of(built, 600), engine(built), engine(built)
    number = own.add_adapter(lora(built))
    for adapters in (None, [-1] * 600):
        assert torch.equal(own.run(ids, [0] * 600, adapter_of_token=adapters), bare.run(ids, [0] * 600))
        own.forget(0), bare.forget(0)
    assert not torch.equal(own.run(ids, [0] * 600, adapter_of_token=[number] * 600), bare.run(ids, [0] * 600))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 5, 7, 16, 33]),
    st.sampled_from([1, 2, 3, 4, 5, 15, 16, 17, 40]),
    st.sampled_from([1, 15, 16, 17, 33, 50]),
    st.integers(0, 9),
)
def test_updates_of_any_sizes_are_products(rows, rank, width, seed):
    built = Built("dense_linear", seed)
    x = built.step("embedding", 40, table=built.random(60, 40))
    built.step("shift", width, x=built.linear(x, width), by=0.0)
    draws = torch.Generator().manual_seed(seed)
    down, up = halves(torch.randn(rank, 40, generator=draws)), halves(torch.randn(width, rank, generator=draws))
    update = LowRankUpdate(x, x + 1, down, up, torch.randn(rank, generator=draws) if seed % 2 else None)
    own, ids = engine(built, 1), ids_of(built, rows, seed)
    number = own.add_adapter([update])
    gain = own.run(ids, [0] * rows, adapter_of_token=[number] * rows)
    own.forget(0)
    gain -= own.run(ids, [0] * rows)
    inputs = built.weights["w0"][ids]
    wanted = (inputs @ down.T + (0 if update.bias is None else update.bias)) @ up.T
    assert_near(gain, wanted)


def test_adapters_that_a_plan_has_no_place_for_are_refused():
    built = llama()
    own, good = engine(built), lora(built)[0]
    attention = next(step for step in built.plan["steps"] if step["op"] == "attention")["to"]
    width = built.plan["registers"][attention]
    nan = good.down.clone()
    nan[0, 0] = float("nan")
    for updates, sentence in (
        ([], "without updates"),
        ([good, good], "a register twice"),
        ([LowRankUpdate(0, 9999, good.down, good.up)], "register 9999, which no step writes"),
        ([LowRankUpdate(attention, attention, torch.zeros(1, width), torch.zeros(width, 1))], "a step `attention`"),
        ([LowRankUpdate(good.y, good.y, good.down, good.up)], f"reads register {good.y}"),
        ([LowRankUpdate(good.x, good.y, good.down[:, 1:], good.up)], "`down` of an adapter is"),
        ([LowRankUpdate(good.x, good.y, good.down, good.up[1:])], "`up` of an adapter is"),
        ([LowRankUpdate(good.x, good.y, good.down, good.up, torch.zeros(9))], "`bias` of an adapter is"),
        ([LowRankUpdate(good.x, good.y, good.down[:0], good.up[:, :0])], "rank 0"),
        ([LowRankUpdate(good.x, good.y, torch.zeros(1025, 48), torch.zeros(96, 1025))], "rank 1025"),
        ([LowRankUpdate(good.x, good.y, nan, good.up)], "NaN or infinite"),
    ):
        with pytest.raises(KernelError, match=sentence):
            own.add_adapter(updates)
    for adapters in ([0], [0, 0], [-2, -1]):
        with pytest.raises(KernelError, match=r"has no adapter|as many adapters"):
            own.run([1, 2], [0, 0], adapter_of_token=adapters)
    number = own.add_adapter([good])
    for unknown in (number + 1, -1, 2**32 + number):
        with pytest.raises(KernelError, match="has no adapter"):
            own.remove_adapter(unknown)
    large = LowRankUpdate(good.x, good.y, torch.full_like(good.down, 3.4e38), good.up)
    with pytest.raises(KernelError, match="NaN or infinite"):  # once it is rounded
        own.add_adapter([large])
    for adapters in ([2**40], ["a"], [None]):
        with pytest.raises(KernelError):
            own.run([1], [0], adapter_of_token=adapters)
    assert own.run([], [], adapter_of_token=[]).shape == (0, own.width) and own.length(0) == 0


def test_adapters_come_and_go_between_calls_and_not_within_one():
    built = llama(layers=12, hidden=96, heads=6, context=4096)
    own, refused = Engine(built.plan, built.weights, 1), []
    number = own.add_adapter(lora(built))
    thread = threading.Thread(target=own.run, args=(ids_of(built, 2000), [0] * 2000, [1999], [number] * 2000))
    thread.start()
    while thread.is_alive():
        for call in (lambda: own.add_adapter(lora(built)), lambda: own.remove_adapter(number)):
            if own.length(0):
                try:
                    call()
                except KernelError as error:
                    refused.append(str(error))
        time.sleep(0.001)
    thread.join()
    assert refused and all("another thread is running it" in text for text in refused)
