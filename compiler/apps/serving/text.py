"""Tokens to text as it grows: no character is split, nothing of a stop string is ever let out."""

from collections.abc import Mapping, Sequence
from typing import Any

_HOLE = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


class TextDecoder:
    """The text of a growing row of tokens, in pieces that are final.

    Decoders look at neighbours (the first word loses its space), so that tokens are decoded behind those of
    the piece before; `prompt_ids` are the last tokens of the prompt.

    visible   texts of special tokens that are part of the text, by their ids; the others are left out
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), visible: Mapping[int, str] | None = None):
        self._tokenizer, self._visible = tokenizer, visible or {}
        self._ids = list(prompt_ids)  # those of the last whole piece, then those behind it
        self._n_final = len(self._ids)  # how many of them are of that piece
        self._emitted = self._decoded().rstrip(_HOLE)  # of the text of all of them, what is out

    def push(self, token: int) -> str:
        """Text that one more token completes; often "", where a character is not complete."""
        if token in self._visible:
            text = self.end() + self._visible[token]
            self._ids, self._n_final, self._emitted = [], 0, ""
            return text
        self._ids.append(token)
        text = self._decoded()
        complete = text.rstrip(_HOLE)  # some decoders make holes of all bytes of a run, also of good ones
        return self._emit(complete, is_final=complete == text)

    def end(self) -> str:
        """Flush buffered bytes that form no character."""
        return self._emit(self._decoded(), is_final=True)

    def _emit(self, text: str, is_final: bool) -> str:
        new_text = text[len(self._emitted) :]
        self._emitted = text if new_text else self._emitted
        if is_final and new_text:
            self._ids = self._ids[self._n_final :]
            self._n_final, self._emitted = len(self._ids), self._decoded()
        return new_text

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def hidden_token_texts_by_id(tokenizer: Any, texts: Sequence[str]) -> dict[int, str]:
    """Texts that are tokens which decoders leave out, by their ids."""
    added: dict[str, int] = tokenizer.get_added_vocab()
    return {added[t]: t for t in texts if t in added and not tokenizer.decode([added[t]], skip_special_tokens=True)}


class StopStrings:
    """Text up to the first stop string.

    The first is the one that ends first, so that it is the same however the text came in pieces.
    """

    def __init__(self, stops: Sequence[str]):
        assert all(stops), "a stop string has a character"
        self._stops = tuple(stops)
        self._buffered = ""
        self.met = False

    @property
    def is_pending(self) -> bool:
        """Whether some text is held back, since it may be part of a stop string."""
        return bool(self._buffered)

    def push_text(self, text: str) -> str:
        """Text so far that can't be part of a stop string."""
        if self.met:
            return ""
        if not self._stops:
            return text
        self._buffered += text
        matches = [(at + len(stop), at) for stop in self._stops if (at := self._buffered.find(stop)) >= 0]
        self.met = bool(matches)
        keep = 0 if matches else max(self._n_partial(stop) for stop in self._stops)
        free = min(matches)[1] if matches else len(self._buffered) - keep
        out, self._buffered = self._buffered[:free], "" if matches else self._buffered[free:]
        return out

    def end(self) -> str:
        """The rest, when no more text comes."""
        out, self._buffered = self._buffered, ""
        return out

    def _n_partial(self, stop: str) -> int:
        """Number of characters at the end that may begin a stop string."""
        return next(
            (n for n in range(min(len(stop) - 1, len(self._buffered)), 0, -1) if self._buffered.endswith(stop[:n])), 0
        )
