"""Tokens to text as it grows: no character is split, nothing of a stop string is ever let out."""

from collections.abc import Sequence
from typing import Any

_HOLE = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


class Words:
    """The text of a growing row of tokens, in pieces that are final.

    Decoders look at neighbours (the first word loses its space), so that tokens are decoded behind those of
    the piece before; `before` are the last tokens of the prompt.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(before)  # those of the last whole piece, then those behind it
        self._whole = len(self._ids)  # how many of them are of that piece
        self._told = self._decoded().rstrip(_HOLE)  # of the text of all of them, what is out

    def push(self, token: int) -> str:
        """What one more token makes certain; often "", where a character is not complete."""
        self._ids.append(token)
        text = self._decoded()
        whole = text.rstrip(_HOLE)  # some decoders make holes of all bytes of a run, also of good ones
        return self._tell(whole, settled=whole == text)

    def end(self) -> str:
        """What was held back: bytes that no character came of."""
        return self._tell(self._decoded(), settled=True)

    def _tell(self, text: str, settled: bool) -> str:
        more = text[len(self._told) :]
        self._told = text if more else self._told
        if settled and more:
            self._ids = self._ids[self._whole :]
            self._whole, self._told = len(self._ids), self._decoded()
        return more

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Stops:
    """Text up to the first stop string.

    The first is the one that ends first, so that it is the same however the text came in pieces.
    """

    def __init__(self, stops: Sequence[str]):
        assert all(stops), "a stop string has a character"
        self._stops = tuple(stops)
        self._held = ""
        self.met = False

    @property
    def holds(self) -> bool:
        """Whether some text is held back, since it may be part of a stop string."""
        return bool(self._held)

    def push(self, text: str) -> str:
        """What of the text so far can't be part of a stop string."""
        if self.met:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.met = bool(found)
        keep = 0 if found else max(self._begun(stop) for stop in self._stops)
        free = min(found)[1] if found else len(self._held) - keep
        out, self._held = self._held[:free], "" if found else self._held[free:]
        return out

    def end(self) -> str:
        """The rest, when no more text comes."""
        out, self._held = self._held, ""
        return out

    def _begun(self, stop: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)
