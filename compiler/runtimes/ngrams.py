"""N-grams of a growing text: earlier positions of the tokens that it ends with."""

from array import array
from typing import NamedTuple

_CANDIDATES = 16  # earlier positions that are compared; those of a frequent pair of tokens are as many as its uses


class NgramMatch(NamedTuple):
    position: int
    length: int


class NgramIndex:
    """Index of a list of tokens that grows at its end: chains of positions behind equal pairs of tokens, and the latest
    position behind each token.

    ids       tokens; new ones are indexed when a match is next asked for
    longest   tokens of an n-gram that are compared

    A new token costs two entries of a dict and one number, a match at most `_CANDIDATES` comparisons.

    Source: prompt lookup decoding (Saxena 2023), whose `PromptLookupCandidateGenerator` in transformers compares the
    n-gram with every window of the text at each token; the chains are those of LZ77 in zlib's `deflate`.
    """

    def __init__(self, ids: list[int], longest: int = 4):
        assert longest >= 1, longest
        self._ids, self._longest = ids, longest
        self._latest: dict[int | tuple[int, int], int] = {}  # by token or pair, the position behind it
        self._earlier = array("q")  # by position: an earlier one behind the same pair, or -1

    def longest_match(self) -> NgramMatch:
        """Position that follows an earlier n-gram equal to the text's last one, and the tokens of that n-gram; (0, 0)
        where there is none. Of several the longest counts, then the latest."""
        self._index_new_tokens()
        ids, end = self._ids, len(self._ids)
        if not end:
            return NgramMatch(0, 0)
        best = NgramMatch(self._latest[ids[-1]], 1) if ids[-1] in self._latest else NgramMatch(0, 0)
        if end < 2 or self._longest < 2:
            return best
        position = self._latest.get((ids[-2], ids[-1]), -1)
        for _ in range(_CANDIDATES):
            if position < 0 or best.length == self._longest:
                break
            length = self._common_suffix(position, end)
            best = NgramMatch(position, length) if length > best.length else best
            position = self._earlier[position]
        return best

    def continuation(self, position: int, count: int) -> list[int]:
        """Tokens from a position on. Behind the last it goes on with the first of them: a text that repeats itself
        is taken to do so again."""
        start = self._ids[position : position + count]
        assert start, f"no token at {position}"
        return [start[i % len(start)] for i in range(count)]

    def _common_suffix(self, position: int, end: int) -> int:
        """Number of tokens before a position that are those before the end, `longest` at most; a pair is."""
        ids, length, limit = self._ids, 2, min(self._longest, position)
        while length < limit and ids[position - 1 - length] == ids[end - 1 - length]:
            length += 1
        return length

    def _index_new_tokens(self) -> None:
        ids, latest, earlier = self._ids, self._latest, self._earlier
        for position in range(len(earlier), len(ids)):
            if position:
                latest[ids[position - 1]] = position
            if position < 2:
                earlier.append(-1)
                continue
            pair = ids[position - 2], ids[position - 1]
            earlier.append(latest.get(pair, -1))
            latest[pair] = position
