"""A tokenizer as llama.cpp has it: tokens, merges, special ones, how text is cut first, the chat template."""

import json
from typing import Any

# What a pattern of a tokenizer's pre-tokenizer tells of its family, by llama.cpp's names; the first that is in it.
_CUTS = (("\\p{N}{1,3}", "llama-bpe"), ("|\\p{N}|", "qwen2"), ('"individual_digits": true', "smollm"))
_UNKNOWN_CUT = "default"


def write_vocabulary(writer: Any, tokenizer: Any, size: int) -> list[str]:
    """Adds what the tokenizer says; sentences where llama.cpp may cut text in another way. None: no vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        writer.add_tokenizer_model("no_vocab")
        return ["The GGUF file has no tokenizer: the model has none that can be written."]
    body = json.loads(backend.to_str())
    if body["model"]["type"] != "BPE":
        writer.add_tokenizer_model("no_vocab")
        return [f"The GGUF file has no tokenizer: llama.cpp's is not of the kind {body['model']['type']}."]
    if not body["model"]["merges"]:
        writer.add_tokenizer_model("no_vocab")
        return ["The GGUF file has no tokenizer: llama.cpp takes none without merges."]
    notes = _tokens(writer, tokenizer, body, size)
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return notes


def _tokens(writer: Any, tokenizer: Any, body: dict[str, Any], size: int) -> list[str]:
    from gguf import TokenType

    special, added = set(tokenizer.all_special_ids), {entry["id"] for entry in body["added_tokens"]}
    names = {number: text for text, number in tokenizer.get_vocab().items()}
    texts = [names.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [
        TokenType.UNUSED
        if number not in names
        else TokenType.CONTROL
        if number in special
        else TokenType.USER_DEFINED
        if number in added
        else TokenType.NORMAL
        for number in range(size)
    ]
    sentences = body["model"].get("byte_fallback", False)  # of the kind of SentencePiece
    writer.add_tokenizer_model("llama" if sentences else "gpt2")
    writer.add_token_list(texts)
    if sentences:
        kinds = [TokenType.BYTE if text.startswith("<0x") else k for text, k in zip(texts, kinds, strict=True)]
        writer.add_token_scores([-float(number) for number in range(size)])
    writer.add_token_types(kinds)
    if sentences:
        return []
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in body["model"]["merges"]])
    cut = cut_of(body)
    writer.add_tokenizer_pre(cut)
    if cut != _UNKNOWN_CUT:
        return []
    return ["llama.cpp may cut text before it looks for tokens in another way than this tokenizer: compare ids."]


def cut_of(body: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut before merges, from tokenizer.json."""
    cutting = body.get("pre_tokenizer") or {}
    text = json.dumps(cutting, ensure_ascii=False).replace("\\\\", "\\")
    known = next((name for part, name in _CUTS if part in text), None)
    plain = cutting.get("type") == "ByteLevel" and cutting.get("use_regex", True)
    return known or ("gpt-2" if plain else _UNKNOWN_CUT)
