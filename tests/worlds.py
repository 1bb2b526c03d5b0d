"""What tests of sources, data and metrics stand on: a tiny tokenizer, a tiny model folder, a context."""

import json
import math
import wave
from pathlib import Path

from effc.compiler.core.settings import Settings
from effc.compiler.models.checkpoints.origin import Origin
from effc.compiler.plugin.context import Context
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.recipe import Invocation, Recipe
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.source import Source

VOCABULARY = 261  # all bytes, <s>, </s> and three spare


def context(folder: Path, origin: Origin | None = None, data=None, **settings) -> Context:
    """A context whose cache lies in `folder`; `data`: name -> (word, arguments)."""
    calls = {name: Invocation(word, {**defaults("data", word), **args}) for name, (word, args) in (data or {}).items()}
    recipe = Recipe(Source("test.effspec", ""), "", {}, {}, calls, {}, {})
    return Context(
        Settings(cache_dir=folder / "cache", **settings), recipe, folder, Registry(), origin, folder / "work"
    )


def defaults(kind: str, word: str) -> dict:
    return {p.name: p.default for p in Registry().vocabulary.word(kind, word).params if not p.required}


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


def hearing(folder: Path) -> None:
    """A small Whisper with random weights that hears a second, its feature extractor and a tokenizer."""
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=64,
        init_std=0.2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    tokenizer(folder)


def clips(folder: Path, count: int = 6, rate: int = 16_000) -> Path:
    """Records of short tones, each with a word that says how high it is."""
    lines = []
    for number in range(count):
        name, pitch = f"tone-{number}.wav", 200 * (number + 1)
        tone(folder / name, [math.sin(2 * math.pi * pitch * t / rate) for t in range(rate // 4)], rate)
        lines.append(json.dumps({"sound": name, "text": f"tone {number}"}))
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "clips.jsonl"


def tone(path: Path, samples: list[float], rate: int, width: int = 2, channels: int = 1) -> Path:
    """A WAV file of samples in -1..1, the same in every channel."""
    top = 2 ** (8 * width - 1) - 1
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        numbers = [round(x * top) + (128 if width == 1 else 0) for x in samples for _ in range(channels)]
        file.writeframes(b"".join(n.to_bytes(width, "little", signed=width > 1) for n in numbers))
    return path
