"""Pre-tokenizers of llama.cpp: known by name, not by pattern."""

import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREES, _ONES = _WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|%s| "
    r"?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# A pattern, and whether a whole word that is a token is taken as it is -> llama.cpp's name, and whether it has this
# very pattern, by llama-vocab.cpp; those with upper and lower case are approximated there.
_BY_PATTERN = {
    (_THREES, True): ("llama-bpe", True),
    (_THREES, False): ("dbrx", True),
    (_ONES, False): ("qwen2", True),
    (_CASED % (_SHORT, _SHORT, r"\p{N}{1,3}"), False): ("gpt-4o", False),
    (_CASED % ("", "", r"\p{N}"), True): ("tekken", False),
}
_UNKNOWN = "default"
DOUBT = "llama.cpp may cut text before it looks for tokens in another way than this tokenizer: compare ids."
# What tells ways of cutting apart: digits, contractions in both cases, scripts, runs of spaces and line ends, symbols.
TEXTS = (
    "In the beginning God created the heaven and the earth.",
    "it's IT'S we'll WE'LL they've I'd",
    "1 12 123 1234 12345 1,234.5 3.14159 2024-01-31",
    "  two   three\n\n\nlines\r\n\tand tabs \n ",
    "def f(x_1):\n    return {'a': [x_1 ** 2, -1]}  # !?",
    "Größe naïve café Ünïcödé",
    "Привет, Мир! ТЕСТ тест",
    "你好，世界。 こんにちは 안녕하세요 १२३",
    "😀👍🏽 ½ ² … — “quoted” $5 €6 a/b\\c",
    "HTTPServerError camelCase snake_case",
)


def pretokenizer_name_and_doubts(tokenizer_json: dict[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for how text is cut before merges, from tokenizer.json; sentences where that may be wrong."""
    cutting = tokenizer_json.get("pre_tokenizer") or {}
    parts = cutting.get("pretokenizers", [cutting])
    kinds, last = [part.get("type") for part in parts], parts[-1]
    ignores_merges = bool(tokenizer_json["model"].get("ignore_merges"))
    name, sure = _UNKNOWN, False
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        by_bytes = last.get("use_regex", True) and not ignores_merges
        if kinds == ["ByteLevel"] and by_bytes:
            name, sure = "gpt-2", True
        elif kinds == ["Digits", "ByteLevel"] and by_bytes and parts[0].get("individual_digits"):
            name, sure = "smollm", True
        elif kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and _isolates(parts[0]):
            name, sure = _BY_PATTERN.get((parts[0]["pattern"].get("Regex"), ignores_merges), (name, sure))
    notes = [] if sure else [DOUBT]
    if tokenizer_json.get("normalizer"):
        notes.append("This tokenizer normalises text first, as Unicode has it, and llama.cpp does not.")
    return name, notes


def _isolates(split_step: dict[str, Any]) -> bool:
    return split_step.get("behavior") == "Isolated" and not split_step.get("invert")


def ambiguous_merge_notes(token_texts: list[str], merges: list[tuple[str, ...]]) -> list[str]:
    """A sentence where tokens of the kind of SentencePiece could be joined otherwise than merges say.

    llama.cpp joins any two tokens that make a third, the best-scored whole first. That is what merges say where each
    such pair is one, and those that make the same token stand together.
    """
    known, pairs, wholes = set(token_texts), set(merges), ["".join(merge) for merge in merges]
    changes = sum(a != b for a, b in pairwise(wholes)) + 1
    split_merges = changes != len(set(wholes))
    missing = any(
        token[:at] in known and token[at:] in known and (token[:at], token[at:]) not in pairs
        for token in set(wholes)
        for at in range(1, len(token))
    )
    return [DOUBT] if split_merges or missing else []


def resolve_doubt_with_llama(gguf_path: Path, tokenizer: Any, notes: list[str]) -> list[str]:
    """The notes, with llama.cpp's own word on `TEXTS` in place of a doubt, where `llama-cpp-python` is installed.

    It is asked in a process of its own: it ends a process that it can't go on in.
    """
    if find_spec("llama_cpp") is None or any("has no tokenizer" in note for note in notes):
        return notes
    call = [sys.executable, "-P", str(Path(__file__).with_name("llama_tokens_child.py")), str(gguf_path)]
    done = subprocess.run(call, input=json.dumps(TEXTS), capture_output=True, text=True, timeout=600)
    if done.returncode:
        return notes
    actual = json.loads(done.stdout)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    notes = [note for note in notes if note != DOUBT]
    differing = [text for text, a, b in zip(TEXTS, expected, actual, strict=True) if a != b]
    if differing:
        notes.append(
            f"llama.cpp makes other tokens than this tokenizer of {len(differing)} of {len(TEXTS)} texts, "
            f"as of {differing[0]!r}."
        )
    return notes
