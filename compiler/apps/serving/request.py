"""One request on its way: what was asked, what was answered so far."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ....kernels.sampling import Sampler
from ...runtimes.speculation import CallCosts, PromptLookup
from .grammar import Matcher
from .logit_edits import LogitEdits
from .text import StopStrings, TextDecoder

Finish = Literal["", "stop", "length", "cancelled", "failed", "refused", "logits_not_finite"]

_BEFORE = 6  # tokens of a prompt that the first of the answer are decoded behind


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued.

    max_tokens    tokens at most; prompt and answer fit in the context. 0 ends it once the prompt is read
    top_k         0 keeps all; the other settings as `kernels.sampling.Sampler` has them
    stops         strings that end the answer and are not part of it
    alternatives  how many of the likeliest tokens are told beside each; None tells no probabilities
    bias          added to the logits of tokens; penalties as `LogitEdits` has them
    grammar       that the answer keeps to, at its beginning
    visible       texts of special tokens that are part of the text, by their ids
    echo          text of the prompt that the answer begins with, None without: where `alternatives` are told, those of
                  the prompt's tokens too
    adapter       whose model answers; "" for the plain one
    owner         client that sent it: it goes on with that client's requests alone, and takes turns with others'
    """

    ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    alternatives: int | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: Matcher | None = None
    visible: Mapping[int, str] = field(default_factory=dict)
    echo: str | None = None
    adapter: str = ""
    owner: str = ""


@dataclass(frozen=True)
class Token:
    """A token of an answer, the logarithm of its probability, and the likeliest ones with theirs.

    logprob   None of a prompt's first token
    offset    characters of the text before it
    """

    id: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...]
    offset: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds of a request: until it got a sequence, from there to its first token, and from that to its last."""

    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class AnswerChunk:
    """Some more of an answer. `finish` says that it was the last, `count` how many tokens there are now.

    n_cached  tokens of the prompt that were known from a request before
    index   of the choice, where a request has several
    timing  of an answer that was whole, with its last chunk
    error   of one that "failed" what broke, for the log and nobody else; of others that have one why
    """

    text: str
    count: int
    finish: Finish = ""
    error: str = ""
    tokens: tuple[Token, ...] = ()
    n_cached: int = 0
    index: int = 0
    timing: Timing | None = None


class Job:
    """A request that was accepted.

    hear      gets the pieces, in the thread of the scheduler
    pending   tokens that the model has not seen yet
    sequence  of the model, None while the request waits and once it has ended
    is_complete  its prompt is read in one call
    n_cached  tokens of the prompt that its sequence had from a request before
    """

    def __init__(
        self, request: Request, on_piece: Callable[[AnswerChunk], None], tokenizer: Any, eos_ids: Sequence[int]
    ):
        self.request, self.hear = request, on_piece
        self.pending = list(request.ids)
        self.sequence: int | None = None
        self.is_complete = False
        self.n_cached = 0
        self.cancelled = False
        self.over = False  # its last piece was heard
        self.count = 0
        self.submitted = time.monotonic()
        self.admitted = 0.0  # when it got a sequence
        self.first = 0.0  # when its first token came
        self._eos_ids = frozenset(eos_ids)
        self._words = TextDecoder(tokenizer, request.ids[-_BEFORE:], request.visible)
        self._stops = StopStrings(request.stops)
        self._n_characters = len(request.echo or "")  # of prompt and answer, those that are held back among them
        self._echo = None if request.echo is None else _Echo(request, request.echo, tokenizer)
        self._history = list(request.ids)
        self._untold: list[Token] = []
        self._lookup: PromptLookup | None = None
        self._sampler = Sampler(
            request.temperature, request.top_k, request.top_p, request.repetition_penalty, request.seed
        )
        self._edits = LogitEdits(request.bias, request.frequency_penalty, request.presence_penalty, request.grammar)

    @property
    def is_reading_prompt(self) -> bool:
        """Whether the model still reads the prompt."""
        return self.count == 0

    @property
    def scores_prompt(self) -> bool:
        """Whether the probabilities of the prompt's tokens are told."""
        return self.request.echo is not None and self.request.alternatives is not None

    @property
    def owner(self) -> int:
        """The sequence that the request has, now that it does not wait."""
        assert self.sequence is not None, "a request that waits has no sequence"
        return self.sequence

    @property
    def cached_ids(self) -> list[int]:
        """The tokens that its sequence has."""
        return self._history[: len(self._history) - len(self.pending)]

    def timing(self, end: float) -> Timing:
        """Timing of an answer that ended at a time."""
        first = self.first or end
        return Timing(self.admitted - self.submitted, first - self.admitted, end - first)

    def draft(self, costs: CallCosts, limit: int, rows: int) -> list[int]:
        """Tokens that may follow, by the n-grams of prompt and answer: as many as pay, `limit` at most, and with one
        more that the model chooses no more than the answer may have."""
        if self._lookup is None:
            self._lookup = PromptLookup(self._history, costs)
        return self._lookup.draft(min(limit, self.request.max_tokens - self.count - 1), rows)

    def observe_draft(self, draft: Sequence[int], n_accepted: int, seconds: float, n_rows: int, total: int) -> None:
        """So many tokens of a draft were accepted, in a call of `n_rows` answers and `total` tokens of drafts."""
        assert self._lookup is not None, "a draft is of a lookup"
        self._lookup.observe(draft, n_accepted, seconds, n_rows, total)

    def has_read(self, drafted: Sequence[int]) -> bool:
        """Whether the answer's last token is this one of a draft: its sequence has read it."""
        if not drafted or self.pending != list(drafted):
            return False
        self.pending = []
        return True

    def observe_prompt(self, logits: Tensor) -> None:
        """Logits [n, vocabulary] behind the next n tokens of the prompt."""
        assert self._echo is not None, "a prompt is scored where the answer begins with it"
        self._echo.observe(logits)

    def append_next_token(self, logits: Tensor) -> AnswerChunk:
        """Choose the next token by logits [vocabulary]; the piece of text that it makes certain."""
        echo, prompt_tokens = self._echo.pop() if self._echo else ("", ())
        if not self.request.max_tokens:
            return AnswerChunk(echo, 0, "length", tokens=prompt_tokens, n_cached=self.n_cached)
        token = self._sampler.sample_next_token(self._edits.apply(logits), self._history)
        is_last = self._edits.push(token)
        self.count += 1
        if self.request.alternatives is not None:
            self._untold.append(_token(token, logits, self.request.alternatives, self._n_characters))
        finish: Finish = ""
        if token in self._eos_ids:
            text, finish = "", "stop"
        else:
            self._history.append(token)
            self.pending = [token]
            text = self._words.push(token)
            self._n_characters += len(text)
            text = self._stops.push_text(text)
            finish = "stop" if is_last else "length" if self.count >= self.request.max_tokens else ""
        if finish:
            text += self._stops.push_text(self._words.end())
            text += self._stops.end()
        finish = "stop" if self._stops.met else finish
        tokens = (*prompt_tokens, *self._pop_tokens_of_final_text())
        return AnswerChunk(echo + text, self.count, finish, tokens=tokens, n_cached=self.n_cached)

    def _pop_tokens_of_final_text(self) -> tuple[Token, ...]:
        """The tokens of text that is out: none that may belong to a stop string."""
        if self._stops.met or self._stops.is_pending:
            return ()
        tokens, self._untold = tuple(self._untold), []
        return tokens


class _Echo:
    """A prompt in front of its answer: its text, and its tokens where their probabilities are told."""

    def __init__(self, request: Request, text: str, tokenizer: Any):
        self._request, self._text = request, text
        self._words, self._n_characters = TextDecoder(tokenizer), 0
        self._tokens: list[Token] = []

    def observe(self, logits: Tensor) -> None:
        """Logits behind the next tokens. Raises ValueError where they are no numbers."""
        ids, alternatives = self._request.ids, self._request.alternatives
        assert alternatives is not None, "probabilities of a prompt are told where those of its answer are"
        if not self._tokens:
            self._tokens.append(Token(ids[0], None, ()))
        if not logits.amax(-1).isfinite().all():
            raise ValueError("logits are no numbers")
        for row in logits:
            if (position := len(self._tokens)) == len(ids):  # the last row is the answer's
                break
            self._n_characters += len(self._words.push(ids[position - 1]))
            offset = min(self._n_characters, len(self._text))  # a tokenizer may cut other texts than it writes
            self._tokens.append(_token(ids[position], row, alternatives, offset))

    def pop(self) -> tuple[str, tuple[Token, ...]]:
        """Text and tokens, once."""
        text, tokens = self._text, tuple(self._tokens)
        self._text, self._tokens = "", []
        return text, tokens


def _token(token_id: int, logits: Tensor, n_top_logprobs: int, offset: int) -> Token:
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(n_top_logprobs, len(logprobs)))
    return Token(token_id, float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)), offset)
