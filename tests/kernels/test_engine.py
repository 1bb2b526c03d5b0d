"""The native engine against the same plan by plain torch operations."""

import pytest
import torch
from effc.kernels import levels, packed
from effc.kernels.engine import Engine
from effc.kernels.native import KernelError

from tests.kernels.engine_oracle import ACTS, wanted_logits
from tests.kernels.engine_plans import Built, gpt2, llama

KERNELS = [kernel for kernel in packed.KINDS if kernel != "dense_linear_int4"]  # whose groups have tests of their own


def share_of(kernel: str) -> float:
    """How far logits may be off: inputs of 8 bits go to the next step where sums of another order differ by little."""
    return 2**-4 if "int8" in kernel else 2**-6


def ids_of(built: Built, count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_near(found: torch.Tensor, wanted: torch.Tensor, share: float = 2**-6) -> None:
    """Activations are rounded to bfloat16 (2**-9) or int8 between sums of another order, several layers deep."""
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= share * float(wanted.abs().max())


def engine(built: Built, threads: int = 2, **more) -> Engine:
    return Engine(built.plan, built.weights, threads, **more)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_prompt_and_tokens_one_by_one_give_what_torch_gives(make, kernel, level):
    built = make(kernel)
    ids = ids_of(built, 40)
    wanted = wanted_logits(built, ids)
    own = engine(built)
    share = share_of(kernel)
    assert_near(own.run(ids[:33], [0] * 33), wanted[:33], share)
    for i in range(33, 40):
        assert_near(own.run([ids[i]], [0]), wanted[i : i + 1], share)
    assert own.length(0) == 40


def test_threads_that_multiply_by_different_kinds_at_once_do_not_write_into_each_others_panels():
    """A thread that is late works on one kind while another already does on the next one: the bits are the same."""
    built = Built("dense_linear")
    x = built.step("embedding", 256, table=built.random(60, 256))
    total = None
    for kernel in ("dense_linear", "dense_linear_int8", "dense_linear_int8_int16", "sparse_linear_int8") * 2:
        built.kernel = kernel
        part = built.linear(x, 512)
        total = part if total is None else built.step("add", 512, x=total, y=part)
    own, ids = engine(built), ids_of(built, 128)
    first = own.run(ids, [0] * 128)
    for _ in range(300):
        own.forget(0)
        assert torch.equal(own.run(ids, [0] * 128), first)


def test_kinds_of_weights_that_meet_one_input_each_read_it_as_they_need_it(level):
    built = Built("dense_linear")
    x = built.step("embedding", 70, table=built.random(60, 70))
    parts = []
    for kernel in KERNELS[:2] + KERNELS[4:]:
        built.kernel = kernel
        parts.append(built.linear(x, 60))
    sums = built.step("add", 60, x=parts[0], y=parts[1])
    built.step("add", 60, x=sums, y=parts[2])
    for count in (1, 2, 5, 15, 16, 17, 40):
        ids = ids_of(built, count)
        assert_near(engine(built).run(ids, [0] * count), wanted_logits(built, ids))


def test_weights_of_int8_that_meet_one_input_in_8_bits_and_in_16_each_read_it_as_they_need_it(level):
    built = Built("dense_linear")
    x = built.step("embedding", 70, table=built.random(60, 70))
    parts = []
    for kernel in ("dense_linear_int8", "dense_linear_int8_int16", "sparse_linear_int8", "dense_linear_int8_int16"):
        built.kernel = kernel
        parts.append(built.linear(x, 60))
    built.step("join", 240, **{"from": parts})
    built.step("shift", 240, x=built.plan["logits"], by=0.0)
    for count in (1, 2, 3, 5, 8, 9, 17, 40):
        ids = ids_of(built, count)
        assert_near(engine(built).run(ids, [0] * count), wanted_logits(built, ids), 1e-5)


@pytest.mark.parametrize("sizes", [(1, 2, 3, 5, 4), (7, 1, 8, 13, 6), (2, 20, 18)])
def test_chunks_of_any_size_are_one_prompt(sizes):
    built = llama()
    ids = ids_of(built, sum(sizes))
    own, at = engine(built), 0
    for size in sizes:
        found = own.run(ids[at : at + size], [0] * size)
        at += size
        assert_near(found, wanted_logits(built, ids[:at])[-size:])


@pytest.mark.parametrize("count", [2, 3, 7, 11, 20])
@pytest.mark.parametrize("kernel", KERNELS)
def test_sequences_of_different_lengths_do_not_see_each_other(kernel, count):
    built = llama(kernel)
    prompts = [ids_of(built, 2 + 5 * i % 17, seed=i) for i in range(count)]
    own = engine(built, max_sequences=count)
    own.run([t for p in prompts for t in p[:-1]], [i for i, p in enumerate(prompts) for _ in p[:-1]], [])
    found = own.run([p[-1] for p in prompts], range(count))
    for row, prompt in zip(found, prompts, strict=True):
        assert_near(row, wanted_logits(built, prompt)[-1], share_of(kernel))


@pytest.mark.parametrize("parallel", ["", "neox", "cohere"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("wanted", [[0], [4, 9, 19], list(range(20)), []])
def test_only_wanted_rows_are_computed_and_they_are_the_same(wanted, threads, parallel):
    built = llama(softcap=5.0, parallel=parallel)
    ids = ids_of(built, 20)
    found = engine(built, threads).run(ids, [0] * 20, wanted)
    assert found.shape == (len(wanted), 70)
    if wanted:
        assert_near(found, wanted_logits(built, ids)[wanted])


def test_what_is_forgotten_leaves_no_trace():
    built = llama()
    ids, other = ids_of(built, 50), ids_of(built, 50, seed=9)
    own = engine(built)
    own.run(ids[:37] + other[:13], [0] * 50, [])
    own.forget(0, 37)
    assert own.length(0) == 37
    assert_near(own.run(ids[37:], [0] * 13), wanted_logits(built, ids)[37:])
    own.forget(0)
    fresh = engine(built).run(other, [0] * 50)
    assert torch.equal(own.run(other, [0] * 50), fresh)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same_logits(threads, monkeypatch):
    monkeypatch.setattr("effc.kernels.engine.usable_cores", lambda: 64)
    built = llama(kv=1, heads=3)
    ids = ids_of(built, 70)
    own = engine(built, threads=threads)
    assert own.threads == threads
    wanted = wanted_logits(built, ids)
    assert_near(own.run(ids[:-1], [0] * 69), wanted[:-1])
    assert_near(own.run(ids[-1:], [0]), wanted[-1:])


@pytest.mark.parametrize(
    "attention",
    [
        {"window": 5},
        {"window": 40},
        {"softcap": 2.0},
        {"sinks": True},
        {"heads": 2, "kv": 2},
        {"heads": 4, "kv": 1},
        {"heads": 18, "kv": 2},
        {"d": 6},
        {"d": 80},
    ],
)
def test_attention_of_every_shape(attention, level):
    sinks = attention.pop("sinks", None)
    softcap = attention.pop("softcap", None)
    built = llama(layers=1, **attention)
    for step in built.plan["steps"]:
        if step["op"] == "attention":
            step["sinks"] = built.random(step["heads"]) if sinks else None
            step["softcap"] = softcap
    ids = ids_of(built, 75)
    wanted, own = wanted_logits(built, ids), engine(built)
    assert_near(own.run(ids[:70], [0] * 70), wanted[:70])
    for i in range(70, 75):
        assert_near(own.run(ids[i : i + 1], [0]), wanted[i : i + 1])


def one_step(op: str, width: int = 40, **fields) -> Built:
    b = Built()
    x = b.step("embedding", width, table=b.random(60, width, scale=3.0))
    y = b.step("embedding", width, table=b.random(60, width))
    b.step(op, width, **{"x": x, **({"y": y} if op in ("add", "mul") else {}), **fields})
    return b


STEPS = [
    *(("act", {"kind": kind}) for kind in ACTS if kind != "sqrt"),
    ("add", {}),
    ("mul", {}),
    ("scale", {"by": -1.5}),
    ("shift", {"by": 0.25}),
    ("softcap", {"at": 2.0}),
    ("clip", {"least": -0.5, "most": 2.0}),
    ("xielu", {"square": 0.8, "exponential": 0.3, "linear": 0.5}),
]


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("op, fields", STEPS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_a_pointwise_step_is_what_torch_computes(op, fields, rows, level):
    built = one_step(op, **fields)
    ids = ids_of(built, rows)
    assert_near(engine(built).run(ids, [0] * rows), wanted_logits(built, ids), 3e-6)


@pytest.mark.parametrize("group", [40, 8, 1, 5])
def test_a_root_of_a_mean_of_squares_is_what_torch_computes(group, level):
    built = one_step("act", kind="square")
    mean = built.step("mean", 40 // group, x=2, group=group)
    built.step("act", 40 // group, x=mean, kind="sqrt")
    ids = ids_of(built, 9)
    assert_near(engine(built).run(ids, [0] * 9), wanted_logits(built, ids), 3e-6)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("group, length", [(40, 40), (8, 8), (8, 40), (20, 20)])
def test_a_norm_of_groups_is_what_torch_computes(kind, group, length, level):
    built = one_step("norm", kind=kind, eps=1e-6, group=group, weight=None, bias=None)
    built.plan["steps"][-1].update(weight=built.random(length), bias=built.random(length))
    ids = ids_of(built, 9)
    assert_near(engine(built).run(ids, [0] * 9), wanted_logits(built, ids), 3e-6)


@pytest.mark.parametrize("turned, start", [(20, 0), (8, 0), (12, 4)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_positions_turn_a_part_of_each_head(interleaved, turned, start):
    built = one_step(
        "rotary",
        heads=2,
        head_dim=20,
        rotary_dim=turned,
        start=start,
        scale=1.25,
        interleaved=interleaved,
        inverse_frequencies=None,
    )
    built.plan["steps"][-1]["inverse_frequencies"] = built.random(turned // 2)
    ids = ids_of(built, 30)
    own = engine(built)
    wanted = wanted_logits(built, ids)
    assert_near(own.run(ids[:29], [0] * 29), wanted[:29], 1e-5)
    assert_near(own.run(ids[29:], [0]), wanted[29:], 1e-5)


def test_columns_and_joins_put_registers_together_anew():
    built = one_step("scale", by=1.0)
    x = built.plan["logits"]
    strided = built.step("columns", 12, x=x, start=3, block=4, stride=12, count=3)
    plain = built.step("columns", 9, x=x, start=30, block=9, stride=0, count=1)
    built.step("shift", 21, x=built.step("join", 21, **{"from": [plain, strided]}), by=0.0)
    ids = ids_of(built, 12)
    assert torch.equal(engine(built).run(ids, [0] * 12), wanted_logits(built, ids))


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_embedding_reads_its_rows_out_of_any_packed_weight(kernel, level):
    b = Built(kernel)
    x = b.step("embedding", 75, table=b.packed(60, 75))
    b.step("scale", 75, x=x, by=2.0)
    ids = ids_of(b, 6)
    assert torch.equal(engine(b).run(ids, [0] * 6), wanted_logits(b, ids))


def test_the_level_is_the_one_that_kernels_run_at():
    built = llama()
    ids = ids_of(built, 9)
    with levels.at_forced_level("portable"):
        portable = engine(built).run(ids, [0] * 9)
    assert_near(engine(built).run(ids, [0] * 9), portable)


@pytest.mark.parametrize("kernel", ["sparse_linear", "dense_linear_int8", "dense_linear_int8_int16"])
def test_steady_logits_do_not_depend_on_what_else_a_call_computes(kernel, level):
    built = llama(kernel)
    prompts = [ids_of(built, n, seed=n) for n in (40, 3, 17, 66, 1, 9)]
    alone = []
    for prompt in prompts:
        own = engine(built, threads=1, batch_invariant=True)
        first = prompt[:-1] or [0]
        alone.append(torch.cat([own.run(first, [0] * len(first)), own.run(prompt[-1:], [0])]))
    own = engine(built, max_sequences=6, batch_invariant=True)
    flat = [(t, i) for i, p in enumerate(prompts) for t in p[:-1] or [0]]
    found = own.run([t for t, _ in flat], [i for _, i in flat])
    last = own.run([p[-1] for p in prompts], range(6))
    for i, rows in enumerate(alone):
        assert torch.equal(found[[j for j, (_, owner) in enumerate(flat) if owner == i]], rows[:-1])
        assert torch.equal(last[i], rows[-1])


@pytest.mark.parametrize("window", [None, 5, 40])
def test_a_text_that_is_seen_whole_is_what_torch_gives_among_others(window, level):
    built = llama(whole=True, window=window)
    texts = [ids_of(built, count, seed=count) for count in (1, 3, 33, 70, 9)]
    own = engine(built, max_sequences=len(texts))
    found = own.run([t for text in texts for t in text], [i for i, text in enumerate(texts) for _ in text])
    for rows, text in zip(found.split([len(text) for text in texts]), texts, strict=True):
        assert_near(rows, wanted_logits(built, text))


def test_a_whole_text_longer_than_a_chunk_is_one_text():
    built = llama(layers=1, whole=True, context=1200)
    ids = ids_of(built, 1100)
    found = engine(built).run(ids, [0] * len(ids), [0, 600, 1099])
    assert_near(found, wanted_logits(built, ids)[[0, 600, 1099]])


def test_a_text_that_is_to_be_seen_whole_comes_at_once():
    own = engine(llama(whole=True), max_sequences=2)
    with pytest.raises(KernelError, match="lie apart"):
        own.run([1, 2, 3], [0, 1, 0])
    own.run([1, 2], [0, 0])
    with pytest.raises(KernelError, match="has tokens already"):
        own.run([3], [0])
    own.forget(0)
    assert own.run([3], [0]).shape[0] == 1
