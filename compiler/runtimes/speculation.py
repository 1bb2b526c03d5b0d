"""Speculative decoding from a text's own n-grams: drafts as long as they have paid so far.

A draft's tokens go through the model in the call of the text's last token, and those are accepted that the model
chooses by itself, one after another. The tokens of a text are therefore those that it has without drafts, drawn ones
too, wherever logits of a call do not depend on its number of rows (`batch_invariant` of the engine).
"""

from collections.abc import Sequence

from .ngrams import NgramIndex

DRAFT_TOKENS = 15  # of a draft at most, by default: with the text's last token 16 rows, which kernels take at once
LONGEST, MAX_LONGEST = 4, 64  # tokens of an n-gram that a draft continues: by default, and at most
_LENGTHS = (1, 2, 3, 5, 7, 11, 15)  # of drafts; others only where a limit is one
_ROW_COST = 0.13  # of a call's seconds, a further row, before it is measured
_MEAN_CALLS = 20  # latest measurements of a mean
_MAX_AGE = 256  # calls after which a measurement counts no more
_ALLOWANCE, _MAX_BALANCE = 0.25, 4.0  # tokens' time that drafts may lose at first, and from what they won before
_CREDIT = 0.01  # of each call's time, that drafts may lose
_MEMORY, _FADING = 0.95, 0.998  # of what was accepted: kept with a new draft, and where one did not seem to pay


class CallCosts:
    """Measured seconds of an engine's calls, by their number of rows: of the calling thread's processor, so that other
    processes count as little as may be. Threads may share them."""

    def __init__(self):
        self._means: dict[int, tuple[float, int, int]] = {}  # by rows: seconds, of how many calls, number of the last
        self._n_calls = 0

    def observe(self, rows: int, seconds: float) -> None:
        """A call took so long. One that something else slowed down counts as twice the mean."""
        self._n_calls += 1
        mean, n_measured = self._fresh_mean(rows), 1
        if mean is not None:
            n_measured = min(self._means[rows][1] + 1, _MEAN_CALLS)
            seconds = mean + (min(seconds, 2 * mean) - mean) / n_measured
        self._means[rows] = seconds, n_measured, self._n_calls

    def excess(self, rows: int, extra: int, seconds: float) -> float:
        """Seconds of a call with `extra` further rows beyond those of one with `rows`, as a share of these."""
        before = self._fresh_mean(rows)
        return _ROW_COST * extra if before is None else seconds / before - 1

    def increase(self, rows: int, extra_rows: int) -> float:
        """Seconds that `extra_rows` further rows take, as a share of a call with `rows`; of what was not measured by
        the nearest number of rows that was."""
        before, after = self._fresh_mean(rows), self._fresh_mean(rows + extra_rows)
        if before is None:
            return _ROW_COST * extra_rows
        if after is None:
            larger = [n for n in list(self._means) if n > rows and self._fresh_mean(n) is not None]
            if not larger:
                return _ROW_COST * extra_rows
            nearest = min(larger, key=lambda n: abs(n - rows - extra_rows))
            after = before + (self._means[nearest][0] - before) * extra_rows / (nearest - rows)
        return max(0.0, after / before - 1)

    def _fresh_mean(self, rows: int) -> float | None:
        seconds, _, n_calls = self._means.get(rows, (0.0, 0, -_MAX_AGE))
        return seconds if self._n_calls - n_calls < _MAX_AGE else None


class PromptLookup:
    """Drafts of one text, by what followed its last tokens where it has them earlier.

    Behind n-grams of each length the share of drafts' tokens that was accepted is known. By it, a draft has the length
    at which tokens that are won exceed what its rows cost by most, and not more than twice that of those before. Where
    none wins there is no draft, and after a while one is tried again. Drafts may lose a share of a token's time at
    first, `_CREDIT` of each call's, and what they won.

    ids      tokens of the text; its owner appends to them
    costs    of the engine's calls
    longest  tokens of an n-gram at most
    """

    def __init__(self, ids: list[int], costs: CallCosts, longest: int = LONGEST):
        self._index, self._costs = NgramIndex(ids, longest), costs
        self._outcomes = [(0.0, 0.0)] * (longest + 1)  # by length of the n-gram: accepted tokens, drafts that ended
        self._match, self._longest_draft = 0, 0
        self._balance = _ALLOWANCE

    def draft(self, limit: int, rows: int = 1) -> list[int]:
        """Tokens that may follow, `limit` at most; often none.

        rows   of the call without drafts: those of other texts share it
        """
        self._balance = min(_MAX_BALANCE, self._balance + _CREDIT / rows)
        position, self._match = self._index.longest_match()
        if not self._match or limit < 1:
            return []
        count = self._best_length(min(limit, 2 * self._longest_draft + 1), rows)
        if count:
            return self._index.continuation(position, count)
        if self._costs.increase(rows, 1) <= self._balance:
            accepted, rejected = self._outcomes[self._match]
            self._outcomes[self._match] = accepted * _FADING, rejected * _FADING
        return []

    def observe(
        self, draft: Sequence[int], accepted: int, seconds: float, rows: int = 1, total_drafted: int | None = None
    ) -> None:
        """So many of the last draft's tokens were accepted.

        seconds   of the call
        total_drafted     tokens of all drafts in it; those of this one unless stated
        """
        drafted = len(draft)
        total_drafted, self._longest_draft = total_drafted or drafted, max(self._longest_draft, drafted)
        before, rejected = self._outcomes[self._match]
        self._outcomes[self._match] = before * _MEMORY + accepted, rejected * _MEMORY + (accepted < drafted)
        cost = self._costs.excess(rows, total_drafted, seconds) * drafted / total_drafted
        self._balance = min(_MAX_BALANCE, self._balance + accepted / rows - cost)

    def _best_length(self, limit: int, rows: int) -> int:
        """Tokens of the draft that wins most; 0 where none does, or where too much is lost already."""
        accepted, rejected = self._outcomes[self._match]
        share = (accepted + 1) / (accepted + rejected + 2)
        best, best_gain = 0, 0.0
        for count in (*(n for n in _LENGTHS if n < limit), limit):
            cost = self._costs.increase(rows, count)
            if cost > self._balance:
                break
            expected = share * (1 - share**count) / (1 - share)  # tokens that are accepted, each if those before are
            if expected / rows - cost > best_gain:
                best, best_gain = count, expected / rows - cost
        return best
