"""A `tokenizers.Tokenizer` whose texts are cut into tokens in another process, within limits of time and memory."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise
from threading import Lock
from typing import Any

from ....dsl.syntax.diagnostics import Fault
from .text_process import LARGE, LimitExceeded, text_process

invalid_tokenizer = Fault(
    "bad-tokenizer",
    "A model's tokenizer files can't be read, or describe a tokenizer that breaks.\n\n"
    "What they say comes from whoever made the model: steps that would make thousands of characters of one, texts "
    "padded to millions of tokens and tables that are cut are refused before the tokenizers library reads them. Texts "
    "are cut into tokens in a process of its own, which the kernel ends where it takes more time or memory than ten "
    "times what they need.",
    exit="environment",
)
_HELP = "fetch the tokenizer files again, from somebody whom you trust"
_COLUMNS = 8  # numbers of a token: id, type, attention, special, word, sequence, and where it begins and ends
_NONE = (1 << 32) - 1  # of a token that is of no word or sequence
_STATE = ("encode_special_tokens",)  # sent with every request
_CACHE_BYTES = 16 << 20  # of the tokens of long texts, which are kept: several data sets often are of one file
_answers: dict[str, tuple[dict[str, Any], bytes]] = {}  # by hashes of tokenizers and requests, last used last
_lock = Lock()  # of changes to the answers


class LimitedTokenizer:
    """Stand-in for the library's tokenizer, as transformers calls it: all but encoding is the library's.

    label   names the model in diagnostics
    """

    def __init__(self, library: Any, label: str):
        vars(self).update(_library=library, _label=label, _hash="")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith(("add_", "train")):
            vars(self)["_hash"] = ""
        return getattr(self._library, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._library, name, value)
        if name not in _STATE:
            vars(self)["_hash"] = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return LimitedTokenizer, (self._library, self._label)

    def encode_batch(
        self, input: Sequence[Any], is_pretokenized: bool = False, add_special_tokens: bool = True
    ) -> "list[Encoding]":
        """Tokens of texts, or of pairs of them. Raises Reject (bad-tokenizer) where the library breaks, or takes more
        time or memory than a text of that length may."""
        request = {
            "texts": list(input),
            "special": add_special_tokens,
            "words": is_pretokenized,
            "truncation": self._library.truncation,
            "padding": self._library.padding,
            "split_special": self._library.encode_special_tokens,
        }
        text_length = sum(len(str(text)) for text in input)
        try:
            answer, body = (
                self._request_encoding(request, text_length)
                if text_length < LARGE
                else self._cached_encoding(request, text_length)
            )
        except LimitExceeded as error:
            message = f"{self._label}: the model's tokenizer takes more time or memory at a text than there is for it"
            raise invalid_tokenizer(message, help=_HELP, note=str(error)).rejection() from error
        if answer.get("type") == "TypeError":  # the text is none
            raise TypeError(answer["error"])
        if "error" in answer:
            message = f"{self._label}: the model's tokenizer breaks at a text"
            raise invalid_tokenizer(message, help=_HELP, note=answer["error"].partition("\n")[0]).rejection()
        return self._encodings(answer["lengths"], array("I", body))

    def _cached_encoding(self, request: dict[str, Any], text_length: int) -> tuple[dict[str, Any], bytes]:
        """Answer to a request of a long text: the one before, where tokenizer and text are the same."""
        if not self._hash:
            vars(self)["_hash"] = hashlib.sha256(self._library.to_str().encode()).hexdigest()
        key = hashlib.sha256(json.dumps([self._hash, request]).encode()).hexdigest()
        answer, body = _answers.get(key) or self._request_encoding(request, text_length)
        if "error" not in answer and len(body) <= _CACHE_BYTES // 4:
            with _lock:
                _answers.pop(key, None)
                _answers[key] = answer, body
                while sum(len(columns) for _, columns in _answers.values()) > _CACHE_BYTES:
                    del _answers[next(iter(_answers))]
        return answer, body

    def _request_encoding(self, request: dict[str, Any], text_length: int) -> tuple[dict[str, Any], bytes]:
        """Answer to a request, before which the other process is told of the tokenizer where it does not have it."""
        process = text_process(text_length)
        while True:
            if self._hash:
                answer, body = process.request("encode", {**request, "tokenizer": self._hash})
                if "unknown" not in answer:
                    return answer, body
            description = self._library.to_str().encode()
            vars(self)["_hash"] = hashlib.sha256(description).hexdigest()
            answer, _ = process.request("open", {"tokenizer": self._hash}, description)
            if "error" in answer:
                return answer, b""

    def _encodings(self, lengths: list[list[int]], columns: "array[int]") -> "list[Encoding]":
        offsets = accumulate((_COLUMNS * n for _, *parts in lengths for n in parts), initial=0)
        slices = (columns[start:end] for start, end in pairwise(offsets))
        encodings = []
        for n_sequences, *parts in lengths:
            first, *overflowing = [Encoding(self._library, n_sequences, next(slices)) for _ in parts]
            first.overflowing = overflowing
            encodings.append(first)
        return encodings


class Encoding:
    """Encoding as transformers reads one of the library's: columns of its tokens, and the parts that were cut off.

    numbers   uint32 [8 * tokens]: ids, types, attention, special, words and sequences of all, then where each begins
              and ends
    """

    def __init__(self, library: Any, n_sequences: int, columns: "array[int]"):
        self._library, self.n_sequences, self._numbers = library, n_sequences, columns
        self.overflowing: list[Encoding] = []

    def __len__(self) -> int:
        return len(self._numbers) // _COLUMNS

    def _column(self, index: int) -> list[int]:
        return self._numbers[index * len(self) : (index + 1) * len(self)].tolist()

    @property
    def ids(self) -> list[int]:
        return self._column(0)

    @property
    def type_ids(self) -> list[int]:
        return self._column(1)

    @property
    def attention_mask(self) -> list[int]:
        return self._column(2)

    @property
    def special_tokens_mask(self) -> list[int]:
        return self._column(3)

    @property
    def word_ids(self) -> list[int | None]:
        return [None if word == _NONE else word for word in self._column(4)]

    words = word_ids

    @property
    def sequence_ids(self) -> list[int | None]:
        return [None if sequence == _NONE else sequence for sequence in self._column(5)]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        characters = self._numbers[6 * len(self) :]
        return list(zip(characters[::2], characters[1::2], strict=True))

    @property
    def tokens(self) -> list[str]:
        return [self._library.id_to_token(index) for index in self.ids]

    def token_to_sequence(self, token_index: int) -> int | None:
        return self.sequence_ids[token_index]

    def token_to_word(self, token_index: int) -> int | None:
        return self.word_ids[token_index]

    def token_to_chars(self, token_index: int) -> tuple[int, int] | None:
        return None if self.sequence_ids[token_index] is None else self.offsets[token_index]

    def word_to_tokens(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        words = self.word_ids
        tokens = [token for token in self._tokens_of(sequence_index) if words[token] == word_index]
        return (tokens[0], tokens[-1] + 1) if tokens else None

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> tuple[int, int] | None:
        tokens = self.word_to_tokens(word_index, sequence_index)
        return (self.offsets[tokens[0]][0], self.offsets[tokens[1] - 1][1]) if tokens else None

    def char_to_token(self, char_pos: int, sequence_index: int = 0) -> int | None:
        offsets = self.offsets
        return next((t for t in self._tokens_of(sequence_index) if char_pos in range(*offsets[t])), None)

    def char_to_word(self, char_pos: int, sequence_index: int = 0) -> int | None:
        token = self.char_to_token(char_pos, sequence_index)
        return None if token is None else self.word_ids[token]

    def _tokens_of(self, sequence_index: int) -> list[int]:
        """Tokens of a sequence; all where there is none of that number, as in the library."""
        sequences = self.sequence_ids
        return [t for t, s in enumerate(sequences) if s == sequence_index or sequence_index not in sequences]
