"""A tokenizer as llama.cpp has it: tokens, merges, special ones, how text is cut first, the chat template."""

import json
from typing import Any

from .pretokenizers import ambiguous_merge_notes, pretokenizer_name_and_doubts

_NO_TOKENIZER = "The GGUF file has no tokenizer: "


def write_vocabulary_and_note_doubts(gguf_writer: Any, tokenizer: Any, vocab_size: int) -> list[str]:
    """Adds what the tokenizer says; sentences where llama.cpp may cut text in another way. None: no vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = json.loads(backend.to_str()) if backend is not None else None
    if reason := _unsupported_tokenizer_reason(body):
        gguf_writer.add_tokenizer_model("no_vocab")
        return [_NO_TOKENIZER + reason]
    assert body is not None
    notes = _write_tokens_and_merges(gguf_writer, tokenizer, body, vocab_size)
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(gguf_writer, f"add_{name}_token_id")(token)
    ids = tokenizer("a")["input_ids"]
    gguf_writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        gguf_writer.add_chat_template(tokenizer.chat_template)
    return notes


def _unsupported_tokenizer_reason(tokenizer_json: dict[str, Any] | None) -> str | None:
    """Why llama.cpp takes no tokenizer like this, if it takes none."""
    if tokenizer_json is None:
        return "the model has none that can be written."
    if tokenizer_json["model"]["type"] != "BPE":
        return f"llama.cpp's is not of the kind {tokenizer_json['model']['type']}."
    return None if tokenizer_json["model"]["merges"] else "llama.cpp takes none without merges."


def _write_tokens_and_merges(writer: Any, tokenizer: Any, tokenizer_json: dict[str, Any], n_tokens: int) -> list[str]:
    from gguf import TokenType

    special, added = set(tokenizer.all_special_ids), {entry["id"] for entry in tokenizer_json["added_tokens"]}
    names = {number: text for text, number in tokenizer.get_vocab().items()}
    texts = [names.get(number, f"[PAD{number}]") for number in range(n_tokens)]
    kinds = [
        TokenType.UNUSED
        if number not in names
        else TokenType.CONTROL
        if number in special
        else TokenType.USER_DEFINED
        if number in added
        else TokenType.NORMAL
        for number in range(n_tokens)
    ]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in tokenizer_json["model"]["merges"]]
    sentences = tokenizer_json["model"].get("byte_fallback", False)  # of the kind of SentencePiece
    writer.add_tokenizer_model("llama" if sentences else "gpt2")
    writer.add_token_list(texts)
    if sentences:
        kinds = [TokenType.BYTE if text.startswith("<0x") else k for text, k in zip(texts, kinds, strict=True)]
        writer.add_token_scores(_token_scores_from_merges(texts, merges))
        writer.add_add_space_prefix(_adds_space_prefix(tokenizer_json))
    writer.add_token_types(kinds)
    if sentences:
        return ambiguous_merge_notes(texts, merges)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    cut, doubts = pretokenizer_name_and_doubts(tokenizer_json)
    writer.add_tokenizer_pre(cut)
    return doubts


def _token_scores_from_merges(token_texts: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """llama.cpp joins the pair whose whole has the highest score: so the first that is merged has the highest."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(text, 0)) for text in token_texts]


def _adds_space_prefix(tokenizer_json: dict[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    normalizer, cutting = tokenizer_json.get("normalizer") or {}, tokenizer_json.get("pre_tokenizer") or {}
    parts = [*normalizer.get("normalizers", [normalizer]), *cutting.get("pretokenizers", [cutting])]
    return any(p.get("type") == "Prepend" or p.get("prepend_scheme", "never") != "never" for p in parts)
