"""Encoders with a decoder on the engine, against transformers: logits of targets, greedy tokens, any padding."""

import copy
import json

import effc
import pytest
import torch
import transformers
from effc.compiler.apps.serving.runner import make_decoder
from effc.compiler.artifacts.load import load
from effc.compiler.cli.main import main
from effc.compiler.ir.capture.capture import capture
from effc.compiler.models.rows.forward import total_nll
from effc.compiler.runtimes.native.opening import open_native
from effc.compiler.runtimes.native.plan_files import PLAN
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.runtimes.native.summary import summarise_native
from effc.dsl.syntax.diagnostics import Reject
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import worlds
from tests.compiler.runtimes.native.test_native_target import emitted
from tests.compiler.runtimes.native.test_stored import ODD, _places
from tests.grids import wide

torch.set_num_threads(1)
T5 = {"vocab_size": 128, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": 128, "d_model": 48, "encoder_layers": 2, "decoder_layers": 1, "max_position_embeddings": 40}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
BART |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
MODELS = {
    "t5": ("T5ForConditionalGeneration", T5),
    "t5, gated": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "relative_attention_num_buckets": 8},
    ),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", {**BART, "forced_eos_token_id": 2}),
    "mbart": ("MBartForConditionalGeneration", {**BART, "scale_embedding": True, "forced_bos_token_id": 7}),
    "marian": ("MarianMTModel", {**BART, "scale_embedding": True, "activation_function": "silu"}),
    "marian, two vocabularies": (
        "MarianMTModel",
        {**BART, "share_encoder_decoder_embeddings": False, "tie_word_embeddings": False, "decoder_vocab_size": 90},
    ),
    "pegasus": ("PegasusForConditionalGeneration", {**BART, "scale_embedding": True, "activation_function": "relu"}),
    "blenderbot": ("BlenderbotForConditionalGeneration", BART),
    "plbart": ("PLBartForConditionalGeneration", BART),
}
STAND = ("t5", "bart", "marian", "marian, two vocabularies")
GREEDY = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": True, "output_logits": True}


def made(name, **more):
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**{**sizes, **more})).eval()
    with torch.no_grad():  # norms, biases and tables of distances that a fresh model has as ones and zeros
        for own, parameter in model.named_parameters():
            if parameter.dim() < 2 or "relative" in own:
                parameter.add_(torch.randn(parameter.shape) * (1.0 if "relative" in own else 0.1))
        if "final_logits_bias" in dict(model.named_buffers()):
            model.final_logits_bias.normal_()
    return model


def opened(model, folder, weights="bf16", max_sequences=3):
    return open_native(emitted(folder, model, weights=weights)[0] / "native", threads=1, max_sequences=max_sequences)


def sources(length, seed=0):
    """Three rows, two of them filled up: behind, and before."""
    ids = torch.randint(4, 128, (3, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, (length + 1) // 2 :] = 0
    mask[2, : length // 3] = 0
    return ids, mask


def assert_near(found, wanted, share):
    assert found.shape == wanted.shape
    assert float((found - wanted.float()).norm()) <= share * float(wanted.float().norm())


def assert_says_alike(model, native, length, share=0.02):
    """Of each row alone in torch, and of all rows together in the engine."""
    ids, mask = sources(length)
    known = native.plan["vocabulary"]
    target = torch.randint(4, known, (3, 9), generator=torch.Generator().manual_seed(length))
    found, made = (
        native(ids, mask, decoder_input_ids=target).logits,
        native.generate(ids, attention_mask=mask, max_new_tokens=9, **GREEDY),
    )
    for row, seen in enumerate(mask.bool()):
        source = ids[row][seen][None]
        with torch.no_grad():
            wanted = model(input_ids=source, decoder_input_ids=target[row : row + 1]).logits
            said = model.generate(source, max_new_tokens=9, **GREEDY)
        assert_near(found[row], wanted[0], share)
        wanted, own = torch.cat(said.logits).float(), torch.stack(made.logits, 1)[row]
        tokens, others = said.sequences[0], made.sequences[row, : said.sequences.shape[1]]
        parts = (tokens != others).nonzero()
        if len(parts):  # where they part, two tokens were as likely
            place = int(parts[0, 0]) - 1
            assert wanted[place].max() - wanted[place, others[place + 1]] <= share * wanted[place].abs().max()
        else:
            assert_near(own[: len(wanted)], wanted, share)


@pytest.mark.parametrize("name", wide(MODELS, STAND))
def test_what_is_said_of_a_source_is_what_transformers_says_of_it_alone(name, tmp_path):
    model = made(name)
    native = opened(copy.deepcopy(model), tmp_path)
    for length in (1, 2, 19, 40):
        assert_says_alike(model, native, length)


@pytest.mark.parametrize("name", wide(STAND, ["t5"]))
def test_the_checkpoint_may_be_of_half_precision(name, tmp_path):
    model = made(name).bfloat16()
    assert_says_alike(model.float(), opened(copy.deepcopy(model), tmp_path), 19, 0.03)


@pytest.mark.parametrize(("weights", "share"), [("int8", 0.1), ("int4", 0.5)])
def test_weights_may_be_whole_numbers(weights, share, tmp_path):
    model = made("marian")
    native = opened(copy.deepcopy(model), tmp_path, weights)
    ids, mask = sources(19)
    target = ids[:, :6]
    with torch.no_grad():
        wanted = model(input_ids=ids[:1], decoder_input_ids=target[:1]).logits
    assert_near(native(ids, mask, decoder_input_ids=target).logits[:1], wanted, share)


def test_distances_far_beyond_the_last_bucket_and_a_text_longer_than_any_block(tmp_path):
    model = made("t5")
    native = opened(copy.deepcopy(model), tmp_path)
    ids = torch.randint(4, 128, (1, 700), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model(input_ids=ids, decoder_input_ids=ids[:, :200]).logits
    assert_near(native(ids, decoder_input_ids=ids[:, :200]).logits, wanted, 0.02)


def test_what_is_longer_than_the_positions_is_refused(tmp_path):
    native = opened(made("bart"), tmp_path)
    with pytest.raises(Reject, match="a source of 41 tokens is longer than the 40"):
        native.generate(torch.full((1, 41), 7))
    with pytest.raises(Reject, match="41 tokens is longer than the model's context of 40"):
        native(torch.full((1, 4), 7), decoder_input_ids=torch.full((1, 41), 7))
    said = native.generate(torch.full((1, 40), 7), max_new_tokens=90, eos_token_id=[])
    assert said.shape[1] == 41, "the last token needs no position"
    assert native.num_free_sequences == 3, "sequences that failed are free again"


def test_calls_without_a_source_or_a_target_are_refused(tmp_path):
    native, ids = opened(made("bart"), tmp_path), torch.full((2, 3), 7)
    for asked, said in (
        ({"input_ids": ids}, "a source and `decoder_input_ids`"),
        ({"decoder_input_ids": ids}, "a source and `decoder_input_ids`"),
        ({"input_ids": ids * 99, "decoder_input_ids": ids}, "outside of the 128"),
        ({"input_ids": ids, "decoder_input_ids": ids * 99}, "outside of the 128"),
        ({"input_ids": ids, "attention_mask": ids * 0, "decoder_input_ids": ids}, "a source has no token"),
        ({"input_ids": ids, "decoder_input_ids": ids, "output_attentions": True}, "`output_attentions`"),
    ):
        with pytest.raises(Reject, match=said):
            native(**asked)
    with pytest.raises(Reject, match="`forced_bos_token_id` names a token that is none of the 128"):
        native.generate(ids, forced_bos_token_id=128)
    assert native.num_free_sequences == 3


def test_a_target_token_by_token_is_the_whole(tmp_path):
    native = opened(made("t5"), tmp_path)
    ids, mask = sources(12)
    target = ids[:, :7]
    whole = native(ids, mask, decoder_input_ids=target).logits
    out = native(ids, mask, decoder_input_ids=target[:, :2], use_cache=True)
    parts = [out.logits]
    for place in range(2, 7):
        out = native(decoder_input_ids=target[:, place : place + 1], cache=out.cache)
        parts.append(out.logits)
    assert_near(torch.cat(parts, 1), whole, 0.01)


@pytest.mark.parametrize(
    "rules",
    [
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[3], [5, 6]], "suppress_tokens": [9, 10, 11]},
        {"begin_suppress_tokens": [4], "forced_bos_token_id": 8, "forced_eos_token_id": 2},
        {"min_length": 6, "max_length": 9},
        {"decoder_start_token_id": 5, "repetition_penalty": 1.5},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_rules_of_a_generation_config_hold_as_in_transformers(rules, tmp_path):
    model = made("marian")
    for name, value in rules.items():
        setattr(model.generation_config, name, value)
    native = opened(copy.deepcopy(model), tmp_path, max_sequences=9)
    ids = sources(10)[0][: 1 if "prompt_lookup_num_tokens" in rules else 3]
    options = {} if "max_length" in rules else {"max_new_tokens": 12}
    torch.manual_seed(3)
    expected = model.generate(ids, **options)
    torch.manual_seed(3)
    assert torch.equal(native.generate(ids, **options), expected) and native.num_free_sequences == 9


@pytest.mark.slow
def test_a_fresh_process_says_what_the_program_says_and_the_command_line_says_it_too(tmp_path, capsys):
    made("t5", vocab_size=worlds.VOCABULARY).save_pretrained(tmp_path / "model")
    worlds.tokenizer(tmp_path / "model", start=False)
    recipe = tmp_path / "r.effspec"
    recipe.write_text(
        f'effspec 1\nmodel base = hf("{tmp_path / "model"}")\ndata rows = synthetic(2, length: 16)\n'
        "pipeline thin(base) {\n  cut = prune.multi(remove: 10% of params, score: perplexity(rows))\n}\n"
        'emit thin {\n  native("cpu")\n}\n'
    )
    (result,) = effc.compile(str(recipe), out=tmp_path / "out", cache_dir=tmp_path / "cache")
    checks = {check.what.partition(": ")[2] for check in result.artifacts[0].manifest.checks}
    assert {"logits of a right-padded batch", "greedy tokens", "greedy tokens, right-padded"} <= checks
    model = load(result.artifacts[0].path)
    rows = torch.randint(4, 128, (2, 16))
    nats, count = total_nll(model, rows)
    assert count == 16 and nats > 0
    assert (
        main(
            ["run", str(result.artifacts[0].path), "--prompt", "a text to be read", "-n", "5", "--format", "json", "-q"]
        )
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["new_tokens"] == 5 and answer["prompt_tokens"] == 17
    with pytest.raises(Reject, match="reads a source and answers with a target"):
        make_decoder(model, "thin")
    shown = summarise_native(result.artifacts[0].path / "native")
    assert shown.steps["recall"] == 2 and shown.source["remember"] == 2 and "a source: " in shown.to_text()


def test_an_embedding_of_both_sides_and_the_head_are_stored_once():
    plan = Reader(capture(made("t5")), "bf16").build_plan()
    tables = {s["table"] for s in (*plan.steps, *plan.encoder.steps) if s["op"] == "embedding"}
    assert (
        tables == {"lm_head.weight"} and sum(128 in entry.shape for entry in plan.live_weight_entries().values()) == 1
    )


@pytest.mark.parametrize("kind", ["T5Model", "BartModel"])
def test_a_decoder_without_a_head_is_refused(kind):
    sizes = T5 if kind == "T5Model" else BART
    model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**sizes)).eval()
    with pytest.raises(Reject, match="a decoder with a head of logits"):
        Reader(capture(model), "bf16").build_plan()


# -- stored plans --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, _ = emitted(tmp_path_factory.mktemp("t5"), made("t5", num_layers=1))
    return folder / "native"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pick=st.integers(0, 10**6), value=st.sampled_from([*ODD, 2, 12, 48]), drop=st.booleans())
def test_a_plan_with_another_value_anywhere_never_breaks_the_process(whole, tmp_path, pick, value, drop):
    """It is refused by a sentence, or computes without harm."""
    body = json.loads((whole / PLAN).read_text())
    known = [p for p in _places(body) if p and p[0] != "entries"]
    *path, last = known[pick % len(known)]
    parent = body
    for key in path:
        parent = parent[key]
    if drop:
        del parent[last]
    else:
        parent[last] = copy.deepcopy(value)
    for file in whole.iterdir():
        if file.name != PLAN and not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / PLAN).write_text(json.dumps(body))
    try:
        model = open_native(tmp_path, threads=1, max_sequences=2)
    except Reject as refusal:
        assert all(d.fault.slug == "native-damaged" for d in refusal.diagnostics)
        return
    given = {"decoder_input_ids": torch.tensor([[5, 6]])} if model.engine.sources else {}
    try:
        model(torch.tensor([[5, 6, 7]]), **given)
    except Reject as refusal:
        assert {d.fault.slug for d in refusal.diagnostics} <= {"context-full", "unknown-token"}
