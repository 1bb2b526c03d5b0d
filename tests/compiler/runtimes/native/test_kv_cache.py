"""`native(kv_cache: int8)`: keys and values of 8 bits, in half the memory."""

import copy
from pathlib import Path

import pytest
import torch
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.driver import api
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.linears import NumberFormats
from effc.compiler.runtimes.native.opening import open_native
from effc.compiler.runtimes.native.plan_files import read_plan, write_plan
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.runtimes.sequence_pool import tokens_in
from effc.compiler.targets.native import Native
from effc.dsl.syntax.diagnostics import Reject
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.compiler.runtimes.modes import seeded
from tests.compiler.runtimes.native import survey, test_encoders
from tests.recipes_in_memory import context_of, recipe_of

torch.set_num_threads(1)
ZOO = Path(__file__).parents[4] / "recipes" / "zoo" / "tiny-llama"
FACTS = {"class": "X", "model_type": "llama", "params": 1}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ZOO, local_files_only=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows():
    """Rows [4, 256] of held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(ZOO, local_files_only=True)
    ids = tokenizer((ZOO / "heldout.txt").read_text(), return_tensors="pt").input_ids[0]
    return ids[: 4 * 256].view(4, 256)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Artifacts of one model with caches of both kinds."""
    paths = {kv_cache: tmp_path_factory.mktemp(kv_cache) for kv_cache in ("bf16", "int8")}
    for kv_cache, path in paths.items():
        write_plan(Reader(capture(model), NumberFormats("bf16", kv_cache=kv_cache)).build_plan(), path, FACTS)
    return paths


@torch.no_grad()
def divergence(expected, actual) -> float:
    """Mean KL divergence of a token's prediction, in nats."""
    p, q = (x.log_softmax(-1) for x in (expected, actual))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def token_by_token(opened, rows):
    """Logits of the second half of rows, each token in a call of its own."""
    half = rows.shape[1] // 2
    parts, cache = [], opened(rows[:, :half], use_cache=True).cache
    for i in range(half, rows.shape[1]):
        parts.append(opened(rows[:, i : i + 1], cache=cache, use_cache=True).logits)
    return torch.cat(parts, 1)


def test_predictions_diverge_by_less_than_a_hundredth_of_a_nat(folders, model, rows):
    exact, int8 = (open_native(folders[kind], threads=1) for kind in ("bf16", "int8"))
    expected = model(rows).logits[:, rows.shape[1] // 2 :]
    actual = token_by_token(int8, rows)
    assert divergence(expected, actual) < 0.01
    assert divergence(token_by_token(exact, rows), actual) < 0.01


def test_a_prompt_at_once_and_token_by_token_are_the_same_text(folders, rows):
    opened = open_native(folders["int8"], threads=1, batch_invariant=True)
    assert torch.equal(token_by_token(opened, rows), opened(rows).logits[:, rows.shape[1] // 2 :])


def test_the_plan_says_it_and_a_plan_that_does_not_is_of_bfloat16(folders):
    plans = {kind: read_plan(folder).plan for kind, folder in folders.items()}
    assert all(slot["numbers"] == "int8" for slot in plans["int8"]["slots"])
    assert all("numbers" not in slot for slot in plans["bf16"]["slots"])
    assert plans["int8"]["steps"] == plans["bf16"]["steps"]


def test_as_many_bytes_hold_nearly_twice_the_tokens():
    slot = {"kv_heads": 3, "head_dim": 64, "value_dim": 64}
    plans = [{"slots": [{**slot, "numbers": numbers}]} for numbers in ("bf16", "int8")]
    # 2 bytes of each of 128 numbers; or one, and scales of 2 bytes: two of a key, one of a value
    assert [tokens_in(3 * 256 * 134, plan) for plan in plans] == [134, 256]


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_beams_and_batches_read_the_rows_that_they_go_on_from(folders, rows, mode):
    opened = open_native(folders["int8"], threads=1, batch_invariant=True)
    ids = rows[:2, :40]
    uncached = seeded(opened, ids, use_cache=False, **mode)
    assert torch.equal(seeded(opened, ids, **mode), uncached)


def test_a_prompt_that_begins_as_another_did_goes_on_from_it(folders, rows):
    fresh = open_native(folders["int8"], threads=1, batch_invariant=True)
    opened = open_native(folders["int8"], threads=1, batch_invariant=True, prefix_tokens=512)
    seeded(opened, rows[:1, :100])
    longer = torch.cat([rows[:1, :90], rows[1:2, :20]], 1)
    assert torch.equal(seeded(opened, longer), seeded(fresh, longer))


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "minicpm3"])  # plain, with windows, of latents
def test_a_fresh_process_computes_what_the_model_does(tmp_path, name):
    model = survey.made(name)
    target, folder = Native(path="cpu", kv_cache="int8"), tmp_path / "cpu"
    folder.mkdir()
    target.emit(capture(copy.deepcopy(model)), folder, context_of(tmp_path, model, recipe_of([])))
    checks = verify_forms(folder, model, target.forms())
    assert len(checks) == 6 and all(check.holds for check in checks)


@pytest.mark.parametrize("make", [lambda: test_encoders.made("BertModel"), lambda: tiny.model("mamba")])
def test_a_model_without_a_cache_of_keys_and_values_is_refused(tmp_path, make):
    model = make()
    with pytest.raises(Reject, match="it keeps no keys and values of the tokens before") as refused:
        Reader(capture(model), NumberFormats("bf16", kv_cache="int8")).build_plan()
    assert refused.value.diagnostics[0].help == "leave `kv_cache` out"
    ctx = context_of(tmp_path, model, recipe_of([]))
    with pytest.raises(Reject, match="which `kv_cache` is of"):
        Native(path="x", kv_cache="int8").foresee(ctx)


def test_numbers_that_no_cache_has_are_refused_at_the_word(tmp_path):
    path = tmp_path / "r.effspec"
    path.write_text(
        'effspec 1\nmodel base = zoo("tiny-llama")\npipeline lean(base) { }\nemit lean { native("a", kv_cache: int4) }\n'
    )
    with pytest.raises(Reject) as refused:
        api.plan(path, cache_dir=tmp_path / "cache")
    assert refused.value.diagnostics[0].span.text == "int4"
