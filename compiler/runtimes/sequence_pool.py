"""Places for sequences in an engine. One that is free may still hold tokens, for a prompt that begins like them.

A conversation comes back with all that was said; what was computed of it is not computed again. Source: RadixAttention
in SGLang (Zheng et al. 2024, arXiv 2312.07104), section 3, with a list of places where they have a tree of pages.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...kernels.packed_sizes import kv_bytes_per_token
from .decoder import Decoder

LEAST = 8  # tokens in common from which a place is gone on with: fewer are computed as quickly


def tokens_in(max_bytes: int, plan: Mapping[str, Any]) -> int:
    """Number of tokens whose keys and values fit into so many bytes; 0 where a plan does not state the size of one."""
    one = sum(map(kv_bytes_per_token, plan.get("slots", ())))
    return max_bytes // one if one else 0


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    common = min(len(a), len(b))
    if a[:common] != b[:common]:
        common = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return common


@dataclass(frozen=True)
class _Sequence:
    owner: str
    ids: list[int]


class AcquiredSlot(NamedTuple):
    number: int
    n_shared_tokens: int


class SequencePool:
    """
    count    of places; the engine's sequences are numbered so
    tokens   that free places hold in all; the one that was used longest ago goes first. 0 holds none
    """

    def __init__(self, engine: Decoder, count: int, tokens: int = 0):
        self._engine, self._tokens = engine, tokens
        self._empty = list(range(count))[::-1]
        self._sequences: OrderedDict[int, _Sequence] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        """Number of free sequences."""
        return len(self._empty) + len(self._sequences)

    def acquire_slot(self, ids: Sequence[int] = (), owner: str = "") -> AcquiredSlot:
        """A free place for a prompt, and how many of its first tokens are in it already: never all, as the logits of
        the last are wanted. What another `owner` said is not gone on with, since the time that it takes tells of it."""
        ids = list(ids)
        shares = {n: self._shared(entry, ids) for n, entry in self._sequences.items() if entry.owner == owner}
        number = max(shares, key=shares.__getitem__, default=-1)
        if 2 * shares.get(number, 0) < len(self._sequences[number].ids if shares else ()):
            number = -1  # more would be lost than won: two prompts may have no more in common than how they begin
        if not shares.get(number):
            number = self._empty.pop() if self._empty else next(iter(self._sequences))
        shared = shares.get(number, 0)
        if self._sequences.pop(number, None) and (self._engine.backward or not shared):
            self._engine.forget(number, shared)
        return AcquiredSlot(number, shared)

    def release(self, sequence: int, ids: Sequence[int] = (), owner: str = "") -> None:
        """Free a place that holds these tokens; without any it is emptied."""
        if not LEAST < len(ids) <= self._tokens:
            self._engine.forget(sequence, 0)
            self._empty.append(sequence)
            return
        self._sequences[sequence] = _Sequence(owner, list(ids))
        while sum(len(entry.ids) for entry in self._sequences.values()) > self._tokens:
            self._drop()

    def _drop(self) -> None:
        number, _ = self._sequences.popitem(last=False)
        self._engine.forget(number, 0)
        self._empty.append(number)

    def _shared(self, entry: _Sequence, ids: list[int]) -> int:
        """Length of the common prefix with `ids`, without the last token, that a sequence can be cut back to; 0 if too
        short."""
        common = common_prefix(entry.ids, ids[:-1])
        return common if common >= LEAST and (self._engine.backward or common == len(entry.ids)) else 0
