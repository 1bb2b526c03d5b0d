"""An encoder and the decoder behind it in one plan, against torch; and plans whose parts do not fit each other."""

import copy
import threading
import time
from itertools import chain

import pytest
import torch
from effc.kernels.engine import Cancelled, Engine
from effc.kernels.engine_plan import check_plan_and_weights
from effc.kernels.native import KernelError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.engine_oracle import wanted_logits
from tests.kernels.engine_plans import Built, llama, translator
from tests.kernels.test_engine import assert_near

BUILT = translator()
SHARE = 2**-5  # twice that of a decoder alone: as many layers again lie before it


def ids_of(count: int, seed: int = 0, most: int = 67) -> list[int]:
    return torch.randint(0, most, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def engine(built: Built, threads: int = 2, **more) -> Engine:
    return Engine(built.plan, built.weights, threads, **more)


@pytest.mark.parametrize("kernel", ["dense_linear", "dense_linear_int8"])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 90])
def test_tokens_recall_a_source_of_any_length(kernel, length, level):
    built, source, ids = translator(kernel, layers=2), ids_of(length), ids_of(40, 1)
    own = engine(built)
    own.encode(source, [0] * length)
    assert own.source(0) == length and own.length(0) == 0
    wanted = wanted_logits(built, ids, source)
    assert_near(own.run(ids[:30], [0] * 30), wanted[:30], SHARE)
    for place in range(30, 40):  # one by one, by the schedule of few rows
        assert_near(own.run(ids[place : place + 1], [0])[0], wanted[place], SHARE)


def test_sources_of_one_call_do_not_see_each_other():
    sources, targets = [ids_of(n, n) for n in (5, 1, 64, 17)], [ids_of(n, n) for n in (3, 7, 1, 20)]
    own = engine(BUILT, max_sequences=4)
    own.encode([*chain(*sources)], [n for n, source in enumerate(sources) for _ in source])
    found = own.run([*chain(*targets)], [n for n, ids in enumerate(targets) for _ in ids])
    for source, ids, part in zip(sources, targets, found.split([len(t) for t in targets]), strict=True):
        assert_near(part, wanted_logits(BUILT, ids, source), SHARE)


def test_a_sequence_that_is_forgotten_may_have_another_source():
    own, ids = engine(BUILT), ids_of(9, 3)
    for source in (ids_of(70, 4), ids_of(3, 5)):
        own.encode(source, [0] * len(source))
        own.run(ids, [0] * 9)
        own.forget(0, 4)  # the source stays
        assert own.source(0) == len(source)
        assert_near(own.run(ids[4:], [0] * 5), wanted_logits(BUILT, ids, source)[4:], SHARE)
        own.forget(0)
        assert own.source(0) == own.length(0) == 0


def test_a_source_longer_than_what_a_kernel_takes_is_one_source():
    built = translator(sources=900)
    source, ids = ids_of(900), ids_of(3, 1)
    own = engine(built)
    own.encode(source, [0] * 900)
    assert_near(own.run(ids, [0] * 3), wanted_logits(built, ids, source), SHARE)


@pytest.mark.parametrize("recall", [{"softcap": 3.0}, {"scale": 1.0}])
def test_scores_of_a_source_may_be_capped_and_scaled_otherwise(recall, level):
    built, source, ids = translator(**recall), ids_of(20), ids_of(6, 1)
    own = engine(built)
    own.encode(source, [0] * 20)
    assert_near(own.run(ids, [0] * 6), wanted_logits(built, ids, source), SHARE)


def test_steady_logits_depend_neither_on_neighbours_nor_on_threads():
    source, ids = ids_of(40), ids_of(12, 1)

    def said(threads: int, sequences: int) -> torch.Tensor:
        own = engine(BUILT, threads, max_sequences=sequences, batch_invariant=True)
        own.encode(source * sequences, [n for n in range(sequences) for _ in source])
        return own.run(ids * sequences, [n for n in range(sequences) for _ in ids])[-12:]

    alone = said(1, 1)
    assert torch.equal(alone, said(1, 3)) and torch.equal(alone, said(2, 2))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda e: e.run([1], [0]), "sequence 0 has no source"),
        (lambda e: e.encode([1, 2, 1], [1, 0, 1]), "the tokens of a text lie apart"),
        (lambda e: (e.encode([1], [1]), e.encode([1], [1])), "sequence 1 has tokens already"),
        (lambda e: e.encode([67], [0]), "not all among the 67"),
        (lambda e: e.encode([1] * 91, [0] * 91), "a source of 91 tokens exceeds the 90"),
        (lambda e: e.encode([1], [2]), "not all among this engine's 2"),
        (lambda e: e.encode([1, 2], [0]), "2 tokens need as many sequences"),
        (lambda e: e.source(2), "sequence 2"),
    ],
)
def test_calls_that_do_not_fit_are_refused_before_anything_is_computed(call, said):
    with pytest.raises(KernelError, match=said):
        call(engine(BUILT, max_sequences=2))


def test_an_engine_without_an_encoder_reads_no_sources():
    with pytest.raises(KernelError, match="has no encoder"):
        engine(llama(layers=1)).encode([1], [0])


def test_compiled_code_itself_refuses_tokens_without_a_source(monkeypatch):
    """The sentence is Python's; what keeps memory safe is in C++ as well."""
    own = engine(BUILT)
    monkeypatch.setattr(Engine, "source", lambda self, sequence: 1)
    with pytest.raises(KernelError, match="arguments"):
        own.run([1], [0])


def test_a_cancelled_source_leaves_its_sequence_empty():
    built = translator(layers=4, hidden=256, sources=4096)
    own, ended = engine(built, 1), threading.Event()

    def cancel():
        while not ended.is_set():
            own.cancel()
            time.sleep(0.001)

    other = threading.Thread(target=cancel)
    other.start()
    try:
        with pytest.raises(Cancelled):
            own.encode(ids_of(4096), [0] * 4096)
    finally:
        ended.set()
        other.join()
    assert own.source(0) == 0
    own.encode([1, 2], [0, 0])
    assert own.source(0) == 2


# -- plans ---------------------------------------------------------------------------------------------------


def edited(change) -> tuple[dict, dict]:
    built = copy.deepcopy(BUILT)
    change(built.plan)
    return built.plan, built.weights


def step(plan: dict, op: str) -> dict:
    return next(s for s in plan["steps"] if s["op"] == op)


def of_recall(**fields):
    return lambda plan: step(plan, "recall").update(fields)


def of_remember(**fields):
    return lambda plan: step(plan["encoder"], "remember").update(fields)


def moved(plan):
    """`remember` among the steps of the decoder."""
    own = step(plan["encoder"], "remember")
    plan["slots"].append(plan["encoder"]["slots"][own["slot"]])
    plan["steps"].insert(1, {**own, "slot": len(plan["slots"]) - 1, "k": 0, "v": 0})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_recall(slot=0), "reads slot 0 of an encoder, which remembers nothing there"),
        (of_recall(slot=2), "reads slot 2 of an encoder"),
        (of_recall(slot=-1), "its `slot` is -1"),
        (of_recall(kv_heads=4), "its sizes are not those of slot 1"),
        (of_recall(head_dim=36, heads=2), "its sizes are not those of slot 1"),
        (of_recall(value_dim=13), "its sizes are not those of slot 1"),
        (of_recall(heads=3), "3 query heads are not a multiple of 2"),
        (of_recall(heads=2), "its queries have 72 numbers, not 36"),
        (of_recall(q=999), "its `q` is 999"),
        (of_recall(window=3), "it has a field `window`"),
        (of_remember(slot=0), "its slot 0 is not there or not free"),
        (of_remember(slot=9), "its slot 9 is not there"),
        (of_remember(kv_heads=1), "its sizes are not those of slot 1"),
        (of_remember(k=0), "its registers have"),
        (of_remember(to=3), "it has a field `to`"),
        (of_remember(v=999), "its `v` is 999"),
        (moved, "only an encoder remembers"),
        (lambda plan: plan.pop("encoder"), "which remembers nothing there"),
        (lambda plan: plan.update(encoder=[1]), "its encoder is not an object"),
        (lambda plan: plan.update(encoder=None), "its encoder is not an object"),
        (lambda plan: plan["encoder"].update(encoder=plan["encoder"].copy()), "its encoder has an encoder"),
        (lambda plan: plan["encoder"].update(logits=1), "it has logits"),
        (lambda plan: plan["encoder"].update(context=8193), "it sees 8193 tokens at once"),
        (lambda plan: plan["encoder"].update(context=0), "its context is no number of tokens"),
        (lambda plan: plan["encoder"]["steps"].pop(), "the encoder: a slot of its cache is not used"),
        (lambda plan: step(plan["encoder"], "norm").update(weight="nowhere"), "the encoder, step 1, norm"),
        (lambda plan: step(plan["encoder"], "attention").update(distances="w0"), "is not float32"),
        (
            lambda plan: plan["encoder"]["steps"].insert(1, {**step(plan, "recall"), "q": 0, "to": 1}),
            "remembers nothing",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused_with_their_place(change, said):
    with pytest.raises(KernelError, match=said):
        check_plan_and_weights(*edited(change))


def test_a_table_of_distances_of_a_whole_text_has_a_middle():
    with pytest.raises(KernelError, match="has 8 columns, and none is in their middle"):
        check_plan_and_weights(translator(distances=8).plan, translator(distances=8).weights)


FIELDS = ("slot", "kv_heads", "head_dim", "value_dim", "heads", "q", "k", "v", "to", "context", "scale", "distances")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_change_of_either_part_crashes_the_engine(data):
    """A plan is refused with a sentence, or runs; no memory but its own is read (also under the sanitizers)."""
    built = copy.deepcopy(BUILT)
    part = data.draw(st.sampled_from([built.plan, built.plan["encoder"]]))
    for _ in range(data.draw(st.integers(1, 3))):
        own = data.draw(st.sampled_from([*part["steps"], *part["slots"], part]))
        names = [name for name in own if name in FIELDS] or ["context"]
        own[data.draw(st.sampled_from(names))] = data.draw(
            st.sampled_from([-1, 0, 1, 2, 3, 12, 18, 24, 36, 512, 513, 2**31 - 1, 2**31, None, 1.5, "w1", True])
        )
    if data.draw(st.booleans()) and len(part["steps"]) > 1:
        part["steps"].pop(data.draw(st.integers(0, len(part["steps"]) - 1)))
    try:
        own = Engine(built.plan, built.weights, 1)
    except KernelError:
        return
    source = min(own.sources, 40)
    if source:
        own.encode([1] * source, [0] * source)
    count = min(own.context, 5)
    assert own.run([1] * count, [0] * count).shape == (count, own.width)
