"""Keys and values of the engine in int8, against plain torch, at every level; and against bfloat16."""

import copy

import pytest
import torch
from effc.kernels import levels
from effc.kernels.engine import Engine
from effc.kernels.native import KernelError

from tests.kernels.engine_oracle import rounded_to_int8, wanted_logits
from tests.kernels.engine_plans import Built, llama, translator
from tests.kernels.test_engine import assert_near, engine, ids_of

SHAPES = [
    {},
    {"window": 5},
    {"window": 40},
    {"softcap": 2.0},
    {"heads": 2, "kv": 2},
    {"heads": 4, "kv": 1},
    {"heads": 7, "kv": 1},
    {"heads": 18, "kv": 2},
    {"d": 6},
    {"d": 32},
    {"d": 80},
    {"d": 512, "heads": 1, "kv": 1},
]


def on_int8(built: Built) -> Built:
    """The plan with keys and values in int8."""
    built = copy.deepcopy(built)
    for plan in filter(None, (built.plan, built.plan.get("encoder"))):
        plan["slots"] = [{**slot, "numbers": "int8"} for slot in plan["slots"]]
    return built


def one_attention(**attention) -> Built:
    """Attention of a single layer, whose output is the logits: nothing rounds it afterwards."""
    b = Built("dense_linear_int8_int16", 5, 512)
    heads, kv, d = (attention.pop(name, default) for name, default in (("heads", 6), ("kv", 2), ("d", 64)))
    x = b.step("embedding", 96, table=b.random(60, 96))
    q, k, v = (b.linear(x, n * d) for n in (heads, kv, kv))
    b.step("scale", heads * d, x=b.attention(q, k, v, heads, kv, d, **attention), by=1.0)
    return on_int8(b)


@pytest.mark.parametrize("attention", SHAPES, ids=str)
def test_a_prompt_and_tokens_one_by_one_attend_to_codes_as_torch_does(attention, level):
    built = one_attention(**attention)
    ids = ids_of(built, 75)
    wanted, own = wanted_logits(built, ids), engine(built)
    # Sums are exact; what torch lacks is 16 bits of queries and shares, and exp to 2e-7. A number between two codes may
    # go to the other where the linear layer before it sums in another order.
    assert_near(own.run(ids[:66], [0] * 66), wanted[:66], 2e-3)
    for i in range(66, 75):
        assert_near(own.run(ids[i : i + 1], [0]), wanted[i : i + 1], 2e-3)


def test_every_level_gives_what_the_portable_one_gives(level):
    built = one_attention()
    ids = ids_of(built, 300)
    with levels.at_forced_level("portable"):
        expected = engine(built).run(ids, [0] * 300)
    assert_near(engine(built).run(ids, [0] * 300), expected, 1e-5)


def test_sinks_and_slopes_count_as_they_do_beside_bfloat16(level):
    built = llama(layers=1)
    for step in built.plan["steps"]:
        if step["op"] == "attention":
            step.update(sinks=built.random(6), slopes=built.random(6, scale=0.1))
    built = on_int8(built)
    ids = ids_of(built, 70)
    assert_near(engine(built).run(ids, [0] * 70), wanted_logits(built, ids))


@pytest.mark.parametrize("length", [1, 33, 90])
def test_a_source_is_recalled_from_int8(length, level):
    built = on_int8(translator())
    own, source, ids = engine(built), ids_of(built, length), ids_of(built, 20, 1)
    own.encode(source, [0] * length)
    assert_near(own.run(ids, [0] * 20), wanted_logits(built, ids, source), 2**-5)


def test_rounding_costs_less_than_a_hundredth_of_the_attended_values():
    built = one_attention()
    ids = ids_of(built, 400)
    exact = copy.deepcopy(built)
    exact.plan["slots"] = [{**slot, "numbers": "bf16"} for slot in exact.plan["slots"]]
    int8, plain = (engine(each).run(ids, [0] * 400) for each in (built, exact))
    assert float((int8 - plain).norm() / plain.norm()) < 0.01


def test_one_large_number_spoils_no_more_than_the_32_beside_it():
    k = torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    k[0, 3] = 300.0
    error = (rounded_to_int8(k, 32) - k).abs()[0]
    assert error[32:].max() < 0.02 < error[:32].max()


def test_what_is_forgotten_leaves_no_trace():
    built = on_int8(llama())
    ids, other = ids_of(built, 70), ids_of(built, 70, seed=9)
    own, fresh = engine(built, max_sequences=2), engine(built)
    own.run(ids[:37] + other[:33], [0] * 70, [])
    for length in (37, 32, 5):
        own.forget(0, length)
        assert own.length(0) == length
        own.run(ids[length:37], [0] * (37 - length), [])
    assert_near(own.run(ids[37:], [0] * 33), wanted_logits(built, ids)[37:])
    own.forget(0)
    assert torch.equal(own.run(other, [0] * 70), fresh.run(other, [0] * 70))


def test_what_is_not_a_number_stays_in_its_sequence_and_goes_with_what_is_forgotten():
    b = Built()
    table = b.random(60, 48)
    b.weights[table][7] = float("nan")
    x = b.step("embedding", 48, table=table)
    q, k, v = (b.linear(x, 48) for _ in range(3))
    b.linear(b.attention(q, k, v, 3, 3, 16), 60)
    own = engine(on_int8(b), max_sequences=2)
    rows = own.run([1, 7, 1, 2], [0, 0, 1, 1])
    assert rows[1].isnan().all() and not rows[2:].isnan().any()
    own.forget(0, 1)
    assert not own.run([1, 2, 3], [0, 0, 0]).isnan().any()


@pytest.mark.parametrize("count", [2, 7, 20])
def test_sequences_of_different_lengths_do_not_see_each_other(count):
    built = on_int8(llama())
    prompts = [ids_of(built, 2 + 5 * i % 47, seed=i) for i in range(count)]
    own = engine(built, max_sequences=count)
    own.run([t for p in prompts for t in p[:-1]], [i for i, p in enumerate(prompts) for _ in p[:-1]], [])
    for row, prompt in zip(own.run([p[-1] for p in prompts], range(count)), prompts, strict=True):
        assert_near(row, wanted_logits(built, prompt)[-1])


def test_steady_logits_do_not_depend_on_what_else_a_call_computes(level):
    built = on_int8(llama())
    prompts = [ids_of(built, n, seed=n) for n in (40, 3, 17, 66, 2, 9)]
    own = engine(built, max_sequences=6, batch_invariant=True)
    own.run([t for p in prompts for t in p[:-1]], [i for i, p in enumerate(prompts) for _ in p[:-1]], [])
    together = own.run([p[-1] for p in prompts], range(6))
    for prompt, row in zip(prompts, together, strict=True):
        alone = engine(built, threads=1, batch_invariant=True)
        alone.run(prompt[:-1], [0] * (len(prompt) - 1), [])
        assert torch.equal(alone.run(prompt[-1:], [0])[0], row)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads_shares_an_item(threads, monkeypatch):
    monkeypatch.setattr("effc.kernels.engine.usable_cores", lambda: 64)
    built = on_int8(llama(kv=1, heads=3))
    ids = ids_of(built, 120)
    own, wanted = engine(built, threads=threads), wanted_logits(built, ids)
    assert_near(own.run(ids[:-1], [0] * 119), wanted[:-1])
    assert_near(own.run(ids[-1:], [0]), wanted[-1:])


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_cache_of_int8_takes_little_more_than_half_the_memory():
    sizes = []
    for numbers in ("bf16", "int8"):
        built = llama(layers=1, kv=8, heads=8, d=128, context=4096)
        own = engine(on_int8(built) if numbers == "int8" else built)
        own.run([1] * 1000, [0] * 1000, [])  # what rows take besides
        own.forget(0)
        before = resident_bytes()
        own.run([1] * 4000, [0] * 4000, [])
        sizes.append(resident_bytes() - before)
        own.close()
    assert sizes[1] < 0.65 * sizes[0]


def test_numbers_that_the_engine_lacks_are_refused():
    built = llama()
    built.plan["slots"][0]["numbers"] = "int3"
    with pytest.raises(KernelError, match="a slot of its cache holds 'int3', and the engine bf16 or int8"):
        Engine(built.plan, built.weights, 1)
