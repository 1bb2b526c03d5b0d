"""Continuous batching: one thread that owns a model and gives it, call by call, tokens of all requests.

A call holds one token of each answer that grows, and a piece of the prompts that are still read: short while
others wait for their next token, so that a long prompt slows them and does not stop them.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...runtimes.decoder import AdaptedDecoder, Decoder
from ...runtimes.finite_logits import REASON
from ...runtimes.sequence_pool import SequencePool
from ...runtimes.speculation import CallCosts
from .errors import traceback_location
from .fair_lock import FairLock
from .grammar import GrammarError
from .metrics import Metrics, ModelMetrics
from .request import AnswerChunk, Finish, Job, Request
from .runner import MAX_SEQUENCES

PROMPT_TOKENS = 256  # of a prompt in a call that nobody else waits for; what is no longer is short
SHARED_PROMPT_TOKENS = 64  # of long prompts in a call that answers share
SHORT_PROMPTS_TOKENS = 768  # of short prompts in a call, whoever waits for it
SCORED_PROMPT_TOKENS = 64  # of a prompt in a call, whose probabilities are told: each has a row of logits
SPECULATIVE_ROWS = 16  # of a call with drafts, all answers' tokens among them: kernels take so many rows at once
OTHERS, SEEN_SECONDS = 4, 60  # one of so many places is left to others, where another asked within so long
STOPS = "the server stops"


class QueueFull(Exception):
    """As many requests wait as may; `seconds` until it is worth to ask again."""

    def __init__(self, seconds: int):
        super().__init__(f"ask again in {seconds} s")
        self.seconds = seconds


class Stopped(Exception):
    """The scheduler takes no more requests."""


class Scheduler:
    """Requests over one runner.

    eos_ids   tokens that end an answer
    max_waiting   requests that may wait while others run
    adapted   the runner, where requests may name adapters
    prefix_cache_tokens   of requests before, held for those that go on with them; 0 where the runner can't
    draft_tokens  of an answer's own n-grams that a call verifies at most; 0 where logits depend on a call's rows
    compute_lock  shared with the schedulers of other models
    """

    def __init__(
        self,
        runner: Decoder,
        tokenizer: Any,
        eos_ids: Sequence[int],
        max_waiting: int = 64,
        max_running: int = MAX_SEQUENCES,
        adapted: AdaptedDecoder | None = None,
        prefix_cache_tokens: int = 0,
        draft_tokens: int = 0,
        metrics: ModelMetrics | None = None,
        compute_lock: FairLock | None = None,
    ):
        self._adapted, self._compute_lock = adapted, compute_lock or FairLock()
        self._draft_tokens, self._costs = draft_tokens, CallCosts()
        self._runner, self._tokenizer, self.eos_ids = runner, tokenizer, tuple(eos_ids)
        self._max_waiting = max_waiting
        self.n_slots = min(max_running, runner.max_sequences)
        self._free = SequencePool(runner, self.n_slots, prefix_cache_tokens)
        self._waiting: list[Job] = []
        self._seen: dict[str, float] = {}  # the last two clients, and when each asked last
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._stopping = self._draining = False
        self._thread = threading.Thread(target=self._run_loop, name="effc-scheduler", daemon=True)
        self.metrics = metrics or ModelMetrics(Metrics(), "")

    # -- from any thread -------------------------------------------------------------------------------------

    def start(self) -> None:
        self.metrics.add_queue(self)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it answers new requests."""
        return self._thread.is_alive() and not self._stopping and not self._draining

    @property
    def capacity(self) -> int:
        """Requests that are answered or wait at most."""
        return self.n_slots + self._max_waiting

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def needs_full_prompt(self, adapter: str) -> bool:
        """Whether a prompt must come in one call."""
        return self._adapted is not None and self._adapted.needs_full_prompt(adapter)

    def submit(self, request: Request, on_piece: Callable[[AnswerChunk], None]) -> Job:
        """Take a request; `on_piece` gets its answer piece by piece. Raises QueueFull, or Stopped."""
        (job,) = self.submit_all([(request, on_piece)])
        return job

    def submit_all(self, requests: Sequence[tuple[Request, Callable[[AnswerChunk], None]]]) -> list[Job]:
        """Take all requests of one client, or none, each with what gets its pieces. Raises QueueFull, or Stopped.

        A client that has no other request here is never refused: the queue may be full of somebody else's.
        """
        jobs = [Job(request, on_piece, self._tokenizer, self.eos_ids) for request, on_piece in requests]
        owner = requests[0][0].owner
        with self._changed:
            if not self.alive:
                raise Stopped
            full = len(self._waiting) + len(jobs) > self._max_waiting + len(self._free)
            if full and any(other.request.owner == owner for other in (*self._running, *self._waiting)):
                self.metrics.count_requests("refused", len(jobs))
                raise QueueFull(self._retry_after_s())
            self._waiting += jobs
            self._seen.pop(owner, None)
            self._seen = dict([*self._seen.items(), (owner, time.monotonic())][-2:])
            self._changed.notify()
        return jobs

    def cancel(self, job: Job) -> None:
        """Nobody waits for the answer any more; what has ended stays as it is."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def stop(self) -> None:
        """Take no more requests and cancel all. A call of the model may go on, and nobody waits for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
            for job in [*self._running, *self._waiting]:
                self._notify(job, AnswerChunk("", job.count, "cancelled", STOPS))
        self._runner.cancel()

    def drain(self) -> None:
        """Take no more requests, and end once all that it has are answered."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def join(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)

    def _retry_after_s(self) -> int:
        """Seconds until as many places are free as requests wait, by how long requests took so far."""
        rounds = (len(self._waiting) + 1) / self.n_slots
        return max(1, min(60, round(self.metrics.mean_request_s * rounds)))

    # -- in its own thread -----------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        try:
            while self._wait_and_admit_jobs():
                self._run_batch()
        finally:  # also where it breaks: nobody waits for ever
            with self._changed:
                self._stopping = True
                for job in [*self._running, *self._waiting]:
                    self._finish_job(job, "cancelled", STOPS)
            self.metrics.remove_queue(self)

    def _wait_and_admit_jobs(self) -> bool:
        """Wait for work; drop what was cancelled, and give free places to those who wait."""
        with self._changed:
            while True:
                if self._stopping:
                    return False
                dropped = [job for job in (*self._running, *self._waiting) if job.cancelled]
                for job in dropped:
                    self._finish_job(job, "cancelled", "nobody waits for the answer")
                while (admitted := self._next_waiting_job()) is not None:
                    self._waiting.remove(admitted)
                    self._acquire_sequence(admitted)
                    self._running.append(admitted)
                if self._running:
                    return True
                if self._draining:
                    return False
                self._changed.wait()

    def _next_waiting_job(self) -> Job | None:
        """Request that gets a free place: of the client that has fewest, the one that waits longest."""
        places = Counter(job.request.owner for job in self._running)
        job = min(self._waiting, key=lambda job: places[job.request.owner], default=None)
        are_several = sum(time.monotonic() - seen < SEEN_SECONDS for seen in self._seen.values()) > 1
        limit = self.n_slots - (self.n_slots // OTHERS if are_several else 0)
        return job if job is not None and self._free and places[job.request.owner] < limit else None

    def _acquire_sequence(self, job: Job) -> None:
        """Give a request a sequence, with its adapter; what that holds of the prompt is not read again."""
        adapter = job.request.adapter
        job.is_complete = self.needs_full_prompt(adapter)
        ids = () if job.scores_prompt or job.is_complete else job.request.ids  # tokens that are known have no logits
        job.sequence, job.n_cached = sequence, _ = self._free.acquire_slot(ids, _pool_owner(job))
        if self._adapted is not None:
            self._adapted.set_sequence_adapter(sequence, adapter)
        job.pending = job.pending[job.n_cached :]
        job.admitted = time.monotonic()
        self.metrics.cached_tokens.inc(job.n_cached)

    def _run_batch(self) -> None:
        """Run the next batch of tokens through the model, and advance or finish its jobs."""
        batch = self._next_batch()
        drafts = self._draft_by_job(batch)
        rows = [(job, tokens, drafts.get(job, [])) for job, tokens in batch]
        ids = [token for _, tokens, draft in rows for token in (*tokens, *draft)]
        owners = [job.owner for job, tokens, draft in rows for _ in range(len(tokens) + len(draft))]
        output_positions: list[int] = []
        outputs, at = [], 0
        for job, tokens, draft in rows:
            at += len(tokens) + len(draft)
            is_complete = len(tokens) == len(job.pending)
            count = len(draft) + 1 if is_complete else 0
            if job.is_reading_prompt and job.scores_prompt:
                count = len(tokens)
            output_positions += range(at - count, at)
            outputs.append((job, count, is_complete))
        try:
            with self._compute_lock:
                start = time.thread_time()
                logits = self._runner.run(ids, owners, output_positions)
                seconds = time.thread_time() - start
            assert len(logits) == len(output_positions), (
                f"{len(logits)} rows of logits for {len(output_positions)} tokens"
            )
        except Exception as error:  # whatever it is, the next requests may fare better
            for job, _ in batch:
                reason = STOPS if self._stopping else traceback_location(error)
                self._finish_job(job, "cancelled" if self._stopping else "failed", reason)
            return
        if not any(job.is_reading_prompt for job, _ in batch):
            self._costs.observe(len(ids), seconds)
        self._count_batch_tokens(batch, len(ids))
        for job, tokens in batch:
            job.pending = job.pending[len(tokens) :]
        first = 0
        for job, count, is_complete in outputs:
            job_logits = logits[first : first + count]
            first += count
            if job.is_reading_prompt and job.scores_prompt:
                self._score_prompt(job, job_logits)
                job_logits = job_logits[-1:]
            if is_complete and job.sequence is not None:
                self._append_accepted_tokens(job, job_logits, drafts, len(batch), seconds)

    def _score_prompt(self, job: Job, logits: Any) -> None:
        try:
            job.observe_prompt(logits)
        except Exception as error:
            self._finish_broken_job(job, error, logits)

    def _draft_by_job(self, batch: Sequence[tuple[Job, list[int]]]) -> dict[Job, list[int]]:
        """Tokens that may follow those of answers, which the call verifies; none where it reads prompts too."""
        limit = min(self._draft_tokens, SPECULATIVE_ROWS // len(batch) - 1)
        if limit < 1 or any(job.is_reading_prompt for job, _ in batch):
            return {}
        drafts = {job: job.draft(self._costs, limit, len(batch)) for job, _ in batch}
        return {job: draft for job, draft in drafts.items() if draft}

    def _append_accepted_tokens(
        self, job: Job, logits: Any, drafts: Mapping[Job, list[int]], n_rows: int, seconds: float
    ) -> None:
        """Append the next token of an answer and, while it is the draft's, those behind it.

        logits    [draft + 1, vocabulary] of the tokens that the job has read in this call
        n_rows    tokens of the call without all drafts
        seconds   of the whole call, drafts among them
        """
        draft = drafts.get(job, [])
        for accepted, row in enumerate(logits):
            self._advance_job(job, row)
            if job.sequence is None or job.cancelled or not job.has_read(draft[accepted : accepted + 1]):
                break
        if draft:
            self.metrics.draft_tokens.inc(len(draft))
            self.metrics.accepted_tokens.inc(accepted)
            job.observe_draft(draft, accepted, seconds, n_rows, sum(map(len, drafts.values())))
            self._crop(job)

    def _crop(self, job: Job) -> None:
        """Cut a sequence back to the tokens of its answer that it has read: drafts may have been rejected."""
        if self._draft_tokens and job.sequence is not None and self._runner.length(job.sequence) > len(job.cached_ids):
            self._runner.forget(job.sequence, len(job.cached_ids))

    def _next_batch(self) -> list[tuple[Job, list[int]]]:
        """Choose the tokens of the next call: the last one of each answer that grows, and pieces of prompts."""
        growing = [job for job in self._running if not job.is_reading_prompt]
        starting = [job for job in self._running if job.is_reading_prompt]
        shares = _prompt_tokens_by_job(starting, SHARED_PROMPT_TOKENS if growing else PROMPT_TOKENS)
        pieces = [(job, job.pending if job.is_complete else job.pending[: shares[job]]) for job in shares]
        return [*((job, job.pending) for job in growing), *pieces]

    def _count_batch_tokens(self, batch: Sequence[tuple[Job, list[int]]], n_tokens: int) -> None:
        self.metrics.call.observe(n_tokens)
        self.metrics.prompt_tokens.inc(sum(len(part) for job, part in batch if job.is_reading_prompt))

    def _advance_job(self, job: Job, logits: Any) -> None:
        if job.cancelled:
            return
        starting = job.is_reading_prompt
        try:
            piece = job.append_next_token(logits)
        except GrammarError as error:
            self._finish_job(job, "refused", str(error))
            return
        except Exception as error:
            self._finish_broken_job(job, error, logits)
            return
        self.metrics.new_tokens.inc(min(1, job.count))  # one that ends behind its prompt has none
        if starting and job.count:
            job.first = time.monotonic()
            self.metrics.first.observe(job.first - job.submitted)
        if piece.finish:
            self._finish_job(job, piece.finish, piece=piece)
        elif piece.text or piece.tokens:
            self._notify(job, piece)

    def _finish_broken_job(self, job: Job, error: Exception, logits: Tensor) -> None:
        """End a request that broke: by the model's logits [..., vocabulary], or by what it asks for."""
        if not logits.numel() or logits.amax(-1).isfinite().all():
            self._finish_job(job, "failed", traceback_location(error))
        else:
            self._finish_job(job, "logits_not_finite", REASON)

    def _finish_job(self, job: Job, finish: Finish, error: str = "", piece: AnswerChunk | None = None) -> None:
        """Free the place of a request, then say that it has ended."""
        if job in self._running:
            self._running.remove(job)
            assert job.sequence is not None, "what runs has a sequence"
            self._crop(job)
            is_reusable = finish not in ("failed", "logits_not_finite") and not job.is_complete
            self._free.release(job.sequence, job.cached_ids if is_reusable else (), _pool_owner(job))
            job.sequence = None
        else:
            self._waiting.remove(job)
        end_time = time.monotonic()
        self.metrics.count_requests(finish)
        if piece:
            piece = replace(piece, timing=job.timing(end_time))
            self.metrics.observe_request_seconds(end_time - job.submitted)
            if job.count > 1:
                self.metrics.step.observe((end_time - job.first) / (job.count - 1))
        self._notify(job, piece or AnswerChunk("", job.count, finish, error))

    @staticmethod
    def _notify(job: Job, piece: AnswerChunk) -> None:
        if not job.over:
            job.over = bool(piece.finish)
            job.hear(piece)


def _pool_owner(job: Job) -> str:
    """Whose prompts may go on from a sequence: keys and values are of one adapter."""
    return f"{job.request.owner}\n{job.request.adapter}" if job.request.adapter else job.request.owner


def _prompt_tokens_by_job(starting: Sequence[Job], long_tokens: int) -> dict[Job, int]:
    """Tokens that a call reads of prompts, in the order in which they came: all of the short ones, so that answers wait
    less often, if longer, and none until a long one is read; of long ones what is left of `long_tokens`, and a
    quarter of that for the first prompt in any case."""
    short = sum(len(job.pending) for job in starting if len(job.request.ids) - job.n_cached <= PROMPT_TOKENS)
    budget = max(min(short, SHORT_PROMPTS_TOKENS) + long_tokens // 4, long_tokens)
    shares: Counter[Job] = Counter()
    by_length = sorted(starting, key=lambda job: len(job.pending))
    for job, limit in (*((job, long_tokens // 4) for job in starting[:1]), *((job, budget) for job in by_length)):
        pending = min(len(job.pending), SCORED_PROMPT_TOKENS) if job.scores_prompt else len(job.pending)
        shares[job] += max(0, min(pending - shares[job], limit - shares.total()))
    return {job: shares[job] for job in starting if shares[job]}
