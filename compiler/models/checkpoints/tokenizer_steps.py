"""Steps of `tokenizer.json` by their types, with the fields that each has.

The tokenizers library tries one type after another where none is named, and takes fields that it does not know: what
is reckoned of a step must be what the library makes of it. Source: tokenizers 0.23, `Tokenizer.to_str()`, and fields
that older versions wrote.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_BYTES = "add_prefix_space trim_offsets use_regex"
_WORDS = "replacement add_prefix_space prepend_scheme split str_rep"
_STEPS: dict[str, dict[str, str]] = {
    "normalizer": {
        "Sequence": "normalizers",
        "BertNormalizer": "clean_text handle_chinese_chars strip_accents lowercase",
        "ByteLevel": "",
        "Lowercase": "",
        "NFC": "",
        "NFD": "",
        "NFKC": "",
        "NFKD": "",
        "Nmt": "",
        "Precompiled": "precompiled_charsmap",
        "Prepend": "prepend",
        "Replace": "pattern content",
        "Strip": "strip_left strip_right",
        "StripAccents": "",
    },
    "pre_tokenizer": {
        "Sequence": "pretokenizers",
        "BertPreTokenizer": "",
        "ByteLevel": _BYTES,
        "CharDelimiterSplit": "delimiter",
        "Digits": "individual_digits",
        "FixedLength": "length",
        "Metaspace": _WORDS,
        "Punctuation": "behavior",
        "Split": "pattern behavior invert",
        "UnicodeScripts": "",
        "Whitespace": "",
        "WhitespaceSplit": "",
    },
    "decoder": {
        "Sequence": "decoders",
        "BPEDecoder": "suffix",
        "ByteFallback": "",
        "ByteLevel": _BYTES,
        "CTC": "pad_token word_delimiter_token cleanup",
        "Fuse": "",
        "Metaspace": _WORDS,
        "Replace": "pattern content",
        "Strip": "content start stop",
        "WordPiece": "prefix cleanup",
    },
    "post_processor": {
        "Sequence": "processors",
        "BertProcessing": "sep cls",
        "ByteLevel": _BYTES,
        "RobertaProcessing": "sep cls trim_offsets add_prefix_space",
        "TemplateProcessing": "single pair special_tokens",
    },
}
_MODELS = {
    "BPE": "dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback ignore_merges vocab "
    "merges",
    "WordPiece": "unk_token continuing_subword_prefix max_input_chars_per_word vocab",
    "WordLevel": "vocab unk_token",
    "Unigram": "unk_id vocab byte_fallback",
}
_FULL_REASONS = frozenset(["version", "truncation", "padding", "added_tokens", "model"]) | _STEPS.keys()


class Unbounded(ValueError):
    """A tokenizer that could take any memory or time; the text says where."""


def refuse_unknown_tokenizer_parts(body: Any) -> None:
    """Refuse parts that a file does not have, and a model of no known type; older files name no type of a model."""
    if not isinstance(body, dict):
        raise Unbounded("it is no object")
    _reject_unknown_fields(body, _FULL_REASONS, "it")
    model = body.get("model")
    if not isinstance(model, dict):
        raise Unbounded("it has no model")
    kind = model.get("type")
    if kind is not None and kind not in _MODELS:
        raise Unbounded(f"its model is of the type {str(kind)[:40]!r}")
    fields = _MODELS[kind] if kind is not None else " ".join(_MODELS.values())
    _reject_unknown_fields(model, frozenset(fields.split()), "its model")


def steps(body: Mapping[str, Any], component: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a part of a file in order, each of a known type with its own fields alone."""
    if body.get(component) is not None:
        yield from _iterate_checked_steps(body[component], component)


def _iterate_checked_steps(step: Any, component: str) -> Iterator[Mapping[str, Any]]:
    if not isinstance(step, dict):
        raise Unbounded(f"a step of its {component} is no object")
    kind = step.get("type")
    if not isinstance(kind, str) or kind not in _STEPS[component]:
        raise Unbounded(f"a step of its {component} is of the type {str(kind)[:40]!r}")
    _reject_unknown_fields(step, frozenset(_STEPS[component][kind].split()), f"a step {kind} of its {component}")
    if kind != "Sequence":
        yield step
        return
    inner = step.get(_STEPS[component][kind])
    if not isinstance(inner, list):
        raise Unbounded(f"a sequence of its {component} has no steps")
    for each in inner:
        yield from _iterate_checked_steps(each, component)


def _reject_unknown_fields(declared: Mapping[str, Any], fields: frozenset[str], label: str) -> None:
    unknown = declared.keys() - fields - {"type"}
    if unknown:
        raise Unbounded(f"{label} has a field {min(map(str, unknown))[:40]!r}")
