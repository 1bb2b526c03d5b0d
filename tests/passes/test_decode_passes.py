"""lower.group_queries and lower.sparse_kv: what layers call to attend, in generate, padded, stored and loaded."""

import copy
import json

import pytest
import torch
from effc.compiler.artifacts.load import load
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.artifacts.verify import verify_forms
from effc.compiler.evaluation.promise import OutputPromise
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers import leaves
from effc.compiler.ir.layers.attention import PackedLayer
from effc.compiler.plugin.interfaces import Close
from effc.compiler.targets.hf import Hf
from effc.dsl.checker.values import Bytes, DataRef, Ratio
from effc.kernels.native import KernelError
from transformers import DynamicCache, StaticCache

from tests import tiny
from tests.drafts import write_artifact
from tests.equivalence import max_logit_difference
from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import defaults, refused

GROUPED = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3")
WHOLE = {"keep": Ratio(1.0), "divergence": 9.0}
LONG = {"max_position_embeddings": 512}


def lowered(tmp_path, model, word, **args):
    """The program after the pass, and its note."""
    given = {**defaults("pass", f"lower.{word}"), **args}
    rows = torch.randint(3, 128, (2, 260), generator=torch.Generator().manual_seed(1))
    recipe = recipe_of([("step", f"lower.{word}", given)])
    program, ctx = capture(copy.deepcopy(model)), context_of(tmp_path, model, recipe, rows)
    pass_ = ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call)
    promise = OutputPromise.of(program) if isinstance(pass_.keeps, Close) else None
    pass_.run(program, ctx)
    if promise:
        promise.check(program, pass_.keeps)
    return program, program.notes[-1]


def pruned(tmp_path, model, **args):
    return lowered(tmp_path, model, "sparse_kv", data=DataRef("rows"), **{"window": 32, "sinks": 0, **args})


def prompt(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(2))


def written(tmp_path, program):
    ctx = context_of(tmp_path, tiny.model("llama"), recipe_of([]))
    target = Hf(path="hf", form="auto", shard=Bytes(5 * 10**9))

    def build(folder):
        target.emit(program, folder, ctx)
        return Manifest("hf", checks=verify_forms(folder, program.model, target.forms()))

    write_artifact(tmp_path / "out", build=build)
    return tmp_path / "out"


# -- grouped queries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_queries_compute_the_same_in_every_situation(tmp_path, name):
    model = tiny.model(name)
    program, note = lowered(tmp_path, model, "group_queries")
    assert len(note["grouped"]) == 3 and not note["unchanged"]
    assert max_logit_difference(model, program.model) < 1e-4  # float32 sums in another order
    ids = prompt()
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), program.model.generate(ids, **options))


def test_a_decoded_token_takes_the_rows_and_a_prompt_does_not(tmp_path, monkeypatch):
    from effc.compiler.ir.layers import attention as decoding

    seen = []
    plain = decoding.scaled_dot_product_attention
    monkeypatch.setattr(
        decoding, "scaled_dot_product_attention", lambda q, *a, **o: seen.append(q.shape) or plain(q, *a, **o)
    )
    program, _ = lowered(tmp_path, tiny.model("llama"), "group_queries")
    seen.clear()
    program.model.generate(prompt(), max_new_tokens=3, do_sample=False)
    assert seen == [torch.Size([2, 2, 2, 16])] * 6  # 2 steps after the prompt, 3 layers


@pytest.mark.parametrize(("name", "said"), [("gpt2", "every query head has keys of its own"), ("gemma2", "`softcap`")])
def test_attention_that_rows_do_not_suit_is_refused_with_the_reason(tmp_path, name, said):
    found = refused(lambda: lowered(tmp_path, tiny.model(name), "group_queries")).diagnostics[0]
    assert found.slug == "no-attention" and said in found.message


@pytest.mark.slow
def test_grouped_queries_are_stored_and_loaded(tmp_path):
    program, _ = lowered(tmp_path, tiny.model("llama"), "group_queries")
    out = written(tmp_path, program)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["compact", "compat"]
    model = load(out)
    assert max_logit_difference(program.model, model) == 0.0
    assert "grouped_attention" in json.dumps(json.loads((out / "compact/config.json").read_text())["effc"]["edits"])


# -- a cache that forgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "phi3"])
def test_a_cache_that_keeps_all_decodes_as_before(tmp_path, name):
    model = tiny.model(name, **({"n_positions": 512} if name == "gpt2" else LONG))
    program, note = pruned(tmp_path, model, **WHOLE)
    assert len(note["pruned"]) == 3 and note["accuracy"]["divergence"] < 1e-3  # keys and values in bfloat16
    ids = prompt(length=80)
    assert torch.equal(
        model.generate(ids, max_new_tokens=6, do_sample=False, min_new_tokens=6),
        program.model.generate(ids, max_new_tokens=6, do_sample=False, min_new_tokens=6),
    )


def test_forwards_without_a_cache_are_bit_for_bit_as_before(tmp_path):
    model = tiny.model("llama", **LONG)
    program, _ = pruned(tmp_path, model, keep=Ratio(0.3), divergence=9.0)
    ids = prompt(length=80)
    with torch.no_grad():
        assert torch.equal(program.model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_a_forgetful_cache_grows_and_differs_from_a_whole_one_only_where_it_forgot(tmp_path):
    model = tiny.model("llama", **LONG)
    half, _ = pruned(tmp_path, model, keep=Ratio(0.5), divergence=9.0)
    ids, cache = prompt(length=96), DynamicCache()
    with torch.no_grad():
        half.model(ids, use_cache=True, cache=cache)
        layer = cache.layers[0]
        assert isinstance(layer, PackedLayer) and cache.get_seq_length() == 96
        store = layer.stores[0][2]
        assert (store.blocks, store.recent) == (2, 32)  # all but the window is in blocks
        for place in range(70):
            half.model(prompt(length=1), use_cache=True, cache=cache)
            assert cache.get_seq_length() == 97 + place
    assert store.blocks == 4 and store.length == 166
    assert store.bytes < 0.75 * 166 * 16 * 4 * 4  # 2 sequences, 2 heads


@pytest.mark.slow
def test_a_store_that_is_full_grows(tmp_path):
    from effc.compiler.ir.layers import attention as decoding

    model = tiny.model("llama", **LONG)
    program, _ = pruned(tmp_path, model, **WHOLE)
    longest, ids = decoding._FIRST, prompt(length=100)
    decoding._FIRST = 1
    try:
        found = program.model.generate(ids, max_new_tokens=110, min_new_tokens=110, do_sample=False)
    finally:
        decoding._FIRST = longest
    assert torch.equal(found, program.model.generate(ids, max_new_tokens=110, min_new_tokens=110, do_sample=False))


def test_sequences_that_are_padded_on_the_left_decode_as_each_does_alone(tmp_path):
    model = tiny.model("llama", **LONG)
    program, _ = pruned(tmp_path, model, keep=Ratio(0.5), divergence=9.0)
    ids, mask = prompt(batch=3, length=70), torch.ones(3, 70, dtype=torch.int64)
    mask[0, :9], mask[2, :9] = 0, 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = program.model.generate(ids, attention_mask=mask, **options)[:, 70:]
    for row, pad in enumerate((9, 0, 9)):
        alone = program.model.generate(ids[row : row + 1, pad:], **options)[:, 70 - pad :]
        assert torch.equal(together[row : row + 1], alone)


def test_beams_take_their_caches_along(tmp_path):
    model = tiny.model("llama", **LONG)
    program, _ = pruned(tmp_path, model, **WHOLE)
    ids = prompt(length=70)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
    assert torch.equal(program.model.generate(ids, **options), model.generate(ids, **options))


def test_several_tokens_after_a_prompt_are_fed_as_one_by_one(tmp_path):
    program, _ = pruned(tmp_path, tiny.model("llama", **LONG), keep=Ratio(0.5), divergence=9.0)
    ids, more = prompt(length=70), prompt(length=5)
    with torch.no_grad():
        at_once, single = (program.model(ids, use_cache=True)["cache"] for _ in range(2))
        together = program.model(more, use_cache=True, cache=at_once).logits
        apart = torch.cat([program.model(more[:, i : i + 1], use_cache=True, cache=single).logits for i in range(5)], 1)
    assert torch.allclose(together, apart, atol=1e-5)


@pytest.mark.slow
def test_a_forgetful_cache_is_stored_and_loaded_and_has_no_stock_form(tmp_path):
    program, _ = pruned(tmp_path, tiny.model("llama", **LONG), keep=Ratio(0.5), divergence=9.0)
    out = written(tmp_path, program)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["compact"]
    ids = prompt(length=90)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(load(out).generate(ids, **options), program.model.generate(ids, **options))


@pytest.mark.parametrize(("name", "said"), [("mistral", "newest 5 tokens only"), ("gemma2", "`softcap`")])
def test_attention_that_the_cache_does_not_suit_is_refused_with_the_reason(tmp_path, name, said):
    found = refused(lambda: pruned(tmp_path, tiny.model(name, **LONG), **WHOLE)).diagnostics[0]
    assert found.slug == "no-attention" and said in found.message


def test_more_than_the_divergence_allowed_is_a_missed_expectation(tmp_path):
    def run():
        pruned(tmp_path, tiny.model("llama", **LONG), keep=Ratio(0.2), divergence=1e-9)

    found = refused(run).diagnostics[0]
    assert (found.slug, found.exit) == ("lowering-inaccurate", 4) and "while decoding" in found.message


def test_a_window_that_blocks_do_not_make_and_rows_that_never_leave_it_are_refused(tmp_path):
    model = tiny.model("llama", **LONG)
    assert refused(lambda: pruned(tmp_path, model, **WHOLE | {"window": 40})).diagnostics[0].slug == "unfit-window"
    found = refused(lambda: pruned(tmp_path, model, **WHOLE | {"window": 256})).diagnostics[0]
    assert found.slug == "bad-rows" and "window of 256" in found.message


def test_what_a_forgetful_cache_can_not_do_is_a_sentence(tmp_path):
    program, _ = pruned(tmp_path, tiny.model("llama", **LONG), **WHOLE)
    ids = prompt(length=70)
    with pytest.raises(KernelError, match="a DynamicLayer that is empty"):
        program.model(ids, use_cache=True, cache=StaticCache(program.model.config, max_cache_len=128))
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[0, 5:9] = 0
    with pytest.raises(KernelError, match="hides other tokens"):
        program.model(ids, attention_mask=mask, use_cache=True)
    cache = program.model(ids, use_cache=True)["cache"]
    with pytest.raises(KernelError, match="can't go back"):
        cache.crop(3)


def test_the_leaves_that_decode_are_on_the_list_of_stored_operations():
    from effc.compiler.ir.operations import allowlisted_function, name_of_allowlisted_function

    for found in (leaves.grouped_attention, leaves.packed_attention):
        assert allowlisted_function(name_of_allowlisted_function(found)) is found
