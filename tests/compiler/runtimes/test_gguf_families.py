"""Every family that llama.cpp knows: its file, read alone, computes what the model does; what it can't say is refused."""

import pytest
import torch
from effc.compiler.artifacts.verify_child import inputs_for_config, probe_model
from effc.compiler.ir.capture.capture import capture
from effc.compiler.plugin.target import LoadRequest
from effc.compiler.runtimes.gguf.architectures import KINDS
from effc.compiler.runtimes.gguf.families import FAMILIES
from effc.compiler.runtimes.gguf.pretokenizers import DOUBT, ambiguous_merge_notes, pretokenizer_name_and_doubts
from effc.compiler.targets.gguf import Gguf, refuse_gguf_unwritable_config
from effc.dsl.syntax.diagnostics import Reject
from transformers import AutoConfig, AutoModelForCausalLM

from tests import tiny, worlds
from tests.grids import wide
from tests.recipes_in_memory import context_of, recipe_of

gguf = pytest.importorskip("gguf")
torch.set_num_threads(1)

SIZES = {
    "vocab_size": worlds.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 32}  # of more numbers together than the residual stream has, where that may be
WINDOWS = {"sliding_window": 4}
GEMMA = {**HEADS, **WINDOWS, "query_pre_attn_scalar": 32}
CASES = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, **HEADS}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", HEADS),
    "gemma": ("gemma", HEADS),
    "gemma2": ("gemma2", GEMMA),
    "gemma2, other windows": ("gemma2", {**GEMMA, "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 2}),
    "gemma3": ("gemma3_text", {**GEMMA, "final_logit_softcapping": 9.0, "num_hidden_layers": 7}),
    "gemma3, no windows": ("gemma3_text", {**GEMMA, "layer_types": ["full_attention"] * 5}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "tie_word_embeddings": True}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
    "glm4": ("glm4", HEADS),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.3,
            "attention_bias": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {**WINDOWS, "head_dim": 16}),
    "starcoder2": ("starcoder2", {}),
}


def model_of(case: str):
    name, changes = CASES[case]
    config = AutoConfig.for_model(name, **{**SIZES, **changes})
    if name == "gemma3_text":  # positions of windows turn otherwise, and those of the rest are stretched
        config.rope_parameters["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
        config.rope_parameters["sliding_attention"]["rope_theta"] = 5000.0
    return tiny.randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def written(model, folder, kind="f32"):
    worlds.tokenizer(folder)
    (folder / "g").mkdir()
    Gguf(path="g", type=kind).emit(capture(model), folder / "g", context_of(folder, model, recipe_of([])))
    return folder / "g" / "gguf"


@pytest.mark.parametrize("case", wide(CASES, ("gemma3", "phi3", "cohere2")))
@pytest.mark.slow
def test_a_file_alone_says_what_a_model_computes(tmp_path, case):
    model = model_of(case)
    opened = Gguf.open(written(model, tmp_path), LoadRequest())[0]
    inputs = inputs_for_config(model.config)
    wanted, found = probe_model(model, inputs, 12), probe_model(opened, inputs, 12)
    for what, want in wanted.items():
        if want.is_floating_point():
            assert (want.log_softmax(-1) - found[what].log_softmax(-1)).abs().max() < 1e-4, what
        else:
            assert torch.equal(want, found[what])


def gelu_by_table(x):
    """As llama.cpp has it: the table's places are halves, and so is what lies there."""
    return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_the_file_says_for_it(tmp_path, case, kind, monkeypatch):
    from effc.compiler.artifacts.openers.llama import LlamaCpp

    pytest.importorskip("llama_cpp")
    monkeypatch.setattr("effc.compiler.runtimes.gguf.engine._gelu", gelu_by_table)
    model = model_of(case)
    folder = written(model, tmp_path, kind)
    opened, theirs = Gguf.open(folder, LoadRequest())[0], LlamaCpp(str(folder / "model.gguf"))
    ids = torch.randint(3, 200, (1, 48), generator=torch.Generator().manual_seed(1))  # more than a window
    off = (theirs(ids).log_softmax(-1) - opened(input_ids=ids).logits.log_softmax(-1)).abs().max()
    # Of what the file says: llama.cpp rounds what it multiplies as it rounded the weights, and a number near the edge
    # of two places of the table falls into the other one.
    table = FAMILIES[model.config.model_type].of.activation == "gelu"
    assert off < {"f32": 2e-3 if table else 1e-4, "f16": 2e-2, "bf16": 0.1, "q8_0": 0.3}[kind], off


def test_every_family_has_a_case_and_every_architecture_a_family():
    assert {name for name, _ in CASES.values()} == set(FAMILIES)
    assert {family.kind for family in FAMILIES.values()} | {"deci"} == set(KINDS)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 48}, "scores scaled by 48 and not 32"),
        ("gemma2", {"attn_logit_softcapping": None}, "scores or logits without a cap"),
        ("gemma", {"tie_word_embeddings": False}, "a head of its own"),
        ("stablelm", {"qk_layernorm": True}, "norms of each head with weights of its own"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "other layers without positions"),
        ("phi3", {"sliding_window": 100}, "attention in windows of 100 tokens"),
        ("glm4", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "positions by `yarn`"),
    ],
)
def test_a_config_that_an_architecture_does_not_compute_is_refused_by_name(case, changes, words):
    name, before = CASES[case]
    config = AutoConfig.for_model(name, **{**SIZES, **before, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Reject, match=words) as refused:
        refuse_gguf_unwritable_config(model)
    assert f"llama.cpp's `{FAMILIES[name].kind}`" in refused.value.diagnostics[0].message


def test_a_window_that_llama_cpp_does_not_know_bounds_the_context_and_a_note_says_so(tmp_path):
    name, before = CASES["phi3"]
    config = AutoConfig.for_model(name, **{**SIZES, **before, "sliding_window": 600})
    folder = written(tiny.randomize(AutoModelForCausalLM.from_config(config).eval()), tmp_path)
    assert Gguf.open(folder, LoadRequest())[0].engine.context == 600
    assert "a context of 600 tokens, not 1024" in (folder.parent / "notes.json").read_text()


def test_heads_that_do_not_fill_the_stream_are_refused_where_llama_cpp_counts_on_it(tmp_path):
    config = AutoConfig.for_model("qwen2", **{**SIZES, "head_dim": 16, "num_attention_heads": 2})
    with pytest.raises(Reject, match=r"have 32 numbers together, and llama.cpp's `qwen2` takes them for the 64"):
        written(AutoModelForCausalLM.from_config(config).eval(), tmp_path)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
THREES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("cutting", "whole", "name"),
    [
        ([split(THREES), BYTES], True, "llama-bpe"),
        ([split(THREES), BYTES], False, "dbrx"),
        ([split(THREES.replace("{1,3}", "")), BYTES], False, "qwen2"),
        ([split(THREES.replace("{1,3}", "")), BYTES], True, None),
        ([split(THREES + "|x"), BYTES], True, None),
        ([{**BYTES, "use_regex": True}], False, "gpt-2"),
        ([{**BYTES, "use_regex": True, "add_prefix_space": True}], False, None),
        ([{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}], False, "smollm"),
        ([{"type": "Digits", "individual_digits": False}, {**BYTES, "use_regex": True}], False, None),
    ],
)
def test_only_a_way_of_cutting_that_is_llama_cpps_own_is_named_without_a_doubt(cutting, whole, name):
    body = {"model": {"ignore_merges": whole}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": cutting}}
    assert pretokenizer_name_and_doubts(body) == ((name, []) if name else ("default", [DOUBT]))


def test_tokens_that_are_joined_by_score_are_doubted_where_merges_say_more():
    texts = ["a", "b", "c", "ab", "bc", "abc"]
    assert ambiguous_merge_notes(texts, [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]) == []
    assert ambiguous_merge_notes(texts, [("a", "b"), ("b", "c"), ("ab", "c")]) == [DOUBT]  # a, bc make a token, too
    assert ambiguous_merge_notes(texts, [("ab", "c"), ("a", "b"), ("b", "c"), ("a", "bc")]) == [DOUBT]


def trained(folder, kind):
    """A tokenizer that was trained on the embedded text, cut in one of the ways."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(byte_fallback=kind == "sentences", ignore_merges=kind == "llama-bpe"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "sentences":
        raw.normalizer = normalizers.Replace(" ", "▁")
        alphabet = []
    elif kind == "gpt-2":
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        raw.pre_tokenizer = pre_tokenizers.Sequence(parts)
    else:
        from tokenizers import Regex

        pattern = THREES if kind in ("llama-bpe", "dbrx") else THREES.replace("{1,3}", "")
        parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        raw.pre_tokenizer = pre_tokenizers.Sequence(parts)
    raw.decoder = decoders.ByteLevel()
    spare = ["<s>", "</s>"] + ([f"<0x{byte:02X}>" for byte in range(256)] if kind == "sentences" else [])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=spare, initial_alphabet=alphabet, show_progress=False)
    words = (
        "the heaven and the earth 1234 12 we'll WE'LL they've naïve Größe Привет, Мир! 你好 x_1 = [2, -1]\n\n  a\tb "
    )
    raw.train_from_iterator([words * 3], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    return made


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "sentences"])
def test_llama_cpp_makes_the_same_tokens_or_a_note_says_of_which_text_not(tmp_path, kind):
    from effc.compiler.runtimes.gguf.writing import write_gguf_and_notes

    pytest.importorskip("llama_cpp")
    tokenizer = trained(tmp_path, kind)
    config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": len(tokenizer)})
    notes = write_gguf_and_notes(AutoModelForCausalLM.from_config(config).eval(), tmp_path, "f16", tokenizer)
    if kind == "sentences":  # merges that were trained leave pairs out that llama.cpp joins
        assert all("llama.cpp makes other tokens" in note or "normalises" in note for note in notes)
    else:
        assert not notes
