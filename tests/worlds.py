"""What tests of sources, data and metrics stand on: a tiny tokenizer, a tiny model folder, a context."""

import json
from pathlib import Path

from effc.compiler.checkpoints.origin import Origin
from effc.compiler.words.context import Context, Settings
from effc.compiler.words.shelf import Shelf
from effc.dsl.diagnostics import Reject
from effc.dsl.recipe import Invocation, Recipe
from effc.dsl.source import Source

VOCABULARY = 261  # all bytes, <s>, </s> and three spare


def context(folder: Path, origin: Origin | None = None, data=None, **settings) -> Context:
    """A context whose cache lies in `folder`; `data`: name -> (word, arguments)."""
    calls = {name: Invocation(word, {**defaults("data", word), **args}) for name, (word, args) in (data or {}).items()}
    recipe = Recipe(Source("test.effspec", ""), "", {}, {}, calls, {}, {})
    return Context(Settings(cache_dir=folder / "cache", **settings), recipe, folder, Shelf(), origin, folder / "work")


def defaults(kind: str, word: str) -> dict:
    return {p.name: p.default for p in Shelf().vocabulary.word(kind, word).params if not p.required}


def tokenizer(folder: Path, start: bool = True, chat: str | None = None):
    """One token a byte, `<s>` in front where `start`; saved into `folder` and returned."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *alphabet]
    raw = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if start:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    made.chat_template = chat
    made.save_pretrained(folder)
    return made


def llama(folder: Path, seed: int = 0, dtype: str = "float32", **changes) -> Path:
    """A random Llama of two layers in `folder`, as `save_pretrained` writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    facts = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "pad_token_id": None,
    } | changes
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**facts)).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def refused(call) -> Reject:
    """What a call is refused with; its messages are plain facts."""
    try:
        call()
    except Reject as reject:
        for d in reject.diagnostics:
            text = d.message.lower()
            assert not any(word in text for word in ("invalid", "failed", "please")), text
            assert not text.endswith("."), text
        return reject
    raise AssertionError("it was accepted")


def slug(call) -> str:
    return refused(call).diagnostics[0].slug


def write_safetensors(path: Path, header: dict | bytes, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def classifier(folder: Path) -> None:
    """A small BERT of two classes with random weights, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer(folder)


def torch_packs_bfloat16() -> bool:
    """Whether oneDNN packs bfloat16 weights on this processor."""
    import torch

    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.ones(4, 4, dtype=torch.bfloat16), 1)
    except (RuntimeError, NotImplementedError, AttributeError):  # no AVX-512, no oneDNN, no such operator
        return False
    return True
