"""Limits on numbers in `tokenizer.json`, which the tokenizers library does not check.

The library builds what a file describes and applies it to every text: a dozen replacements of `a` by `aa` fill all
memory with a word, padding to 2**31 with none, and where it finds no memory the process ends. So what steps could
make of one character is reckoned from the file, and counts are held to what tokenizers need.
"""

import base64
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from .tokenizer_steps import Unbounded, refuse_unknown_tokenizer_parts, steps

TEMPLATES = "additional_chat_templates/*.jinja"
_MAX_GROWTH = (
    1024  # characters that one may become: a table of Unicode forms, bytes and a few signs written out make 576
)
_MAX_TEXT = 256  # characters of a text that is put in
_MAX_ADDED = 1024  # that all texts which are put before another have
_MAX_STEPS, _MAX_PIECES, _MAX_SPECIAL = 256, 64, 64  # the last: tokens that one of a template stands for
_MAX_CUT, _MAX_WORD, _MAX_PAD = 1024, 1000, 1 << 20
_MAX_ID = 1 << 24  # the library writes vocabularies by counting to the largest id
_MAX_FORM = 64  # bytes of what a table of Unicode forms makes of a few characters; the longest of Unicode is 33
_FORMS_GROWTH, _BYTES_GROWTH = 18, 4  # of one character in such a table; of one into its bytes


# What an added token says of itself. The library prints other names as they are, past Python, to standard output.
_TOKEN = frozenset({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special", "__type"})


def refuse_unknown_added_token_fields(body: Any) -> None:
    """Refuse added tokens in `tokenizer_config.json` and its kin that have other fields than such tokens have."""
    left = [body]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            added = value.get("added_tokens_decoder")
            tokens = [value, *(added.values() if isinstance(added, dict) else ())]
            for token in tokens:
                token_keys = _TOKEN.intersection(token) if isinstance(token, dict) else ()
                if (token_keys or token is not value) and not (isinstance(token, dict) and token.keys() <= _TOKEN):
                    raise Unbounded("an added token says more of itself than such tokens do")
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def refuse_unbounded_tokenizer_json(body: Any) -> None:
    """Refuse a tokenizer.json whose steps, templates or added tokens could take unbounded time or memory. Raises
    Unbounded, or another of `regular.MISFIT` where a part is of another form."""
    refuse_unknown_tokenizer_parts(body)
    refuse_unknown_added_token_fields({"added_tokens_decoder": dict(enumerate(body.get("added_tokens") or ()))})
    before = [*steps(body, "normalizer"), *steps(body, "pre_tokenizer")]
    for row in (before, list(steps(body, "decoder"))):
        _require_within(len(row), _MAX_STEPS, "the number of its steps")
        _require_within(_max_characters_per_character(row), _MAX_GROWTH, "the number of characters that one becomes")
        _require_within(sum(len(step.get("prepend") or "") for step in row), _MAX_ADDED, "what is put before a text")
        for step in row:
            _refuse_unbounded_step(step)
    processors = list(steps(body, "post_processor"))
    for processor in processors:
        _refuse_long_template(processor)
    _require_within(len(processors), _MAX_STEPS, "the number of its templates")
    _require_within(prod(map(_text_repetitions, processors)), _MAX_PIECES, "how often a text stands in its template")
    _refuse_unbounded_truncation_or_padding(body.get("truncation"), body.get("padding"))
    _require_within(body["model"].get("max_input_chars_per_word") or 0, _MAX_WORD, "the length of a word")
    _require_within(_largest_id(body), _MAX_ID, "the largest id of a token")


def _largest_id(body: Mapping[str, Any]) -> int:
    """Largest id of a token; vocabularies that are lists number their tokens as they lie."""
    vocabulary = body["model"].get("vocab")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    return max([*ids, *(token["id"] for token in body.get("added_tokens") or ())], default=0)


def _require_within(value: Any, bound: int, label: str) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value <= bound:
        raise Unbounded(f"{label} is {str(value)[:20]}, more than the {bound} that are taken")


def _max_characters_per_character(row: Sequence[Mapping[str, Any]]) -> int:
    """Characters that steps make of one at most: each multiplies what one before it may have put there."""
    factors: list[int] = []
    for step in row:
        above = [many for many, before in zip(factors, row, strict=False) if _matches_output_of(step, before)]
        factors.append(min(_growth_factor(step) * max(above, default=1), _MAX_GROWTH + 1))
    return max(factors, default=1)


def _growth_factor(component: Mapping[str, Any]) -> int:
    kind = component.get("type")
    if kind == "Replace":
        text, content = _replaced_text(component), len(component["content"])
        return max(1, -(-content // len(text))) if text else content + 1  # an expression may meet nothing
    return {"Precompiled": _FORMS_GROWTH, "ByteLevel": _BYTES_GROWTH, "Metaspace": 2}.get(str(kind), 1)


def _matches_output_of(component: Mapping[str, Any], previous: Mapping[str, Any]) -> bool:
    """Whether a step may act on what one before it wrote."""
    text = _replaced_text(component)
    return not text or previous.get("type") != "Replace" or bool(set(text) & set(previous["content"]))


def _replaced_text(component: Mapping[str, Any]) -> str:
    """Text that a step replaces, "" where it is no fixed text."""
    pattern = component.get("pattern")
    return str(pattern.get("String") or "") if component.get("type") == "Replace" and isinstance(pattern, dict) else ""


def _refuse_unbounded_step(component: Mapping[str, Any]) -> None:
    for name in ("content", "prepend", "replacement", "prefix", "suffix"):
        _require_within(len(component.get(name) or ""), _MAX_TEXT, f"the length of a `{name}`")
    for name in ("start", "stop"):
        _require_within(component.get(name) or 0, _MAX_CUT, f"`{name}`")
    if component.get("type") == "FixedLength" and not component["length"] > 0:
        raise Unbounded("it cuts texts into pieces of nothing")
    if component.get("type") == "Precompiled" and component.get("precompiled_charsmap"):
        refuse_unbounded_charsmap(base64.b64decode(component["precompiled_charsmap"]))


def refuse_unbounded_charsmap(table: bytes) -> None:
    """A table as sentencepiece writes it: bytes of a trie, the trie, and texts that end with 0."""
    length = int.from_bytes(table[:4], "little")
    if len(table) < 4 or length % 4 or not 0 < length <= len(table) - 4:
        raise Unbounded("its table of Unicode forms is cut")
    _require_within(
        max(map(len, table[4 + length :].split(b"\0"))), _MAX_FORM, "the longest form in its table, in bytes,"
    )


def _refuse_long_template(processor: Mapping[str, Any]) -> None:
    for name in ("single", "pair"):
        _require_within(len(processor.get(name) or ()), _MAX_PIECES, f"the number of pieces of its `{name}` template")
    special = processor.get("special_tokens") or {}
    for token in special.values() if isinstance(special, dict) else special:
        if isinstance(token, dict):
            _require_within(len(token["ids"]), _MAX_SPECIAL, "the number of tokens that one stands for")


def _text_repetitions(processor: Mapping[str, Any]) -> int:
    """Number of times that a template repeats a text."""
    pieces = [piece for name in ("single", "pair") for piece in processor.get(name) or ()]
    return max(1, sum("Sequence" in piece for piece in pieces))


def _refuse_unbounded_truncation_or_padding(truncation: Any, padding: Any) -> None:
    if truncation is not None and not 0 <= truncation["stride"] < max(1, truncation["max_length"]):
        raise Unbounded("it cuts texts so that pieces never end")
    if padding is not None:
        strategy = padding["strategy"]
        fixed = strategy.get("Fixed", 0) if isinstance(strategy, dict) else 0
        for number in (fixed, padding.get("pad_to_multiple_of") or 0):
            _require_within(number, _MAX_PAD, "the length that it pads texts to")
