"""Federated retrieval: clients keep their documents, and the vectors of one client's questions are searched by all.

What goes round are vectors of questions, scores, and numbers of documents that mean something to their owner alone. As
every client scores all that it has, the best of their best are those of one index over everything.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from .bounds import client_refuses, finite_or_nan
from .grid import Answer, Message, Reply, send_and_receive
from .history import ClientUpdate, History, Round
from .rounds import Federation, too_few_clients
from .state import State, value_fault
from .strategy import Payload, Strategy, TrainedState


def top_scores_and_documents(questions: np.ndarray, documents: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and numbers of the best documents for each question, the best first: [q, k] float32 and int64.

    questions, documents   unit vectors [q, d] and [n, d]; k is `count`, or n where that is less
    Of equal ones the one of the lower number is better.
    """
    scores = questions.astype(np.float64) @ documents.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(scores, order, 1).astype(np.float32), order


def merge_top_documents(
    replies: Mapping[int, tuple[np.ndarray, np.ndarray]], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Owners and numbers of the best of what clients found, [q, k] int64 each; of equal ones the lower client's."""
    order = sorted(replies)
    scores = np.concatenate([replies[k][0] for k in order], axis=1)
    numbers = np.concatenate([replies[k][1] for k in order], axis=1)
    owners = np.concatenate([np.full(replies[k][1].shape, k) for k in order], axis=1)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(owners, best, 1), np.take_along_axis(numbers, best, 1)


class RetrievalClient:
    """A client that asks and is asked.

    partners   [q, 2] of each of its questions the client and the number of the document that answers it
    """

    def __init__(
        self, client: int, base: str, questions: np.ndarray, documents: np.ndarray, partners: np.ndarray, count: int
    ):
        self.client, self.base, self.count = client, base, count
        self.questions, self.documents, self.partners = questions, documents, partners

    def __call__(self, message: Message, memory: dict[str, Any]) -> Answer:
        if message.kind == "join":
            return Answer(config={"client": self.client, "examples": len(self.documents), "base": self.base})
        if message.config["base"] != self.base:
            raise client_refuses(
                f"the base model here is {self.base[:12]}, vectors of another mean nothing"
            ).rejection()
        number = {"number": message.number}
        if message.kind == "ask":
            return Answer({"own": {"questions": self.questions}}, number)
        if message.kind == "search":
            return Answer({"own": self._top_documents_of(message.arrays["others"]["questions"])}, number)
        if message.kind == "judge":
            right = message.arrays["others"]["owners"] == self.partners[:, :1]
            right &= message.arrays["others"]["numbers"] == self.partners[:, 1:]
            return Answer(config={**number, "accuracy": float(right.any(1).mean())})
        raise client_refuses(f"a message of the kind `{message.kind}` means nothing here").rejection()

    def _top_documents_of(self, questions: np.ndarray) -> State:
        if questions.ndim != 2 or questions.shape[1] != self.documents.shape[1] or not np.isfinite(questions).all():
            raise client_refuses("what was sent are no vectors of this model's width").rejection()
        scores, numbers = top_scores_and_documents(questions, self.documents, self.count)
        return {"scores": scores, "numbers": numbers}


class RetrievalStrategy(Strategy):
    """Nothing is trained, and nothing is kept."""

    starts = False

    def payload(self, client: int, round_number: int, last_round: int | None) -> Payload:
        raise AssertionError("nothing is trained")

    def aggregate(self, round_number: int, client_states: Mapping[int, TrainedState]) -> None:
        raise AssertionError("nothing is trained")

    def results(self) -> dict[str, State]:
        return {}

    def saved(self) -> dict[str, State]:
        return {}

    def restore(self, arrays: Mapping[str, State]) -> None: ...


class RetrievalFederation(Federation):
    """A round for every client: its questions are answered by all, and it judges what they found.

    The table's accuracy is the share of its questions whose own document is among the best `count`. A client that
    fails, is late or sends no scores is searched without, and named.
    """

    count: int = 1

    def run(self) -> History:
        self._wait_for_clients()
        for number, client in enumerate(sorted(self.members), start=1):
            round_ = self._query_round(number, client)
            self.course.rounds.append(round_)
            self.on_round(round_)
        if not any(r.updates for r in self.course.rounds):
            raise too_few_clients(
                "no client got an answer", note=self._faults_text(self.course.rounds[-1].faults)
            ).rejection()
        return self.course

    def _query_round(self, round_number: int, client: int) -> Round:
        started, faults, sizes = time.monotonic(), dict(self.faults), [0, 0]
        (reply,) = self._exchange_and_count_bytes("ask", round_number, {client: {}}, sizes).values()
        questions = _question_vectors_or_none(reply)
        if questions is None:
            return Round(round_number, {}, {**faults, client: _failure_reason(reply)}, time.monotonic() - started)
        payloads = {k: {"questions": questions} for k in sorted(self.members)}
        pairs = {}
        for k, reply in self._exchange_and_count_bytes("search", round_number, payloads, sizes).items():
            pair = _scores_and_indices_or_none(reply, len(questions), self.count)
            if pair is None:
                faults[k] = _failure_reason(reply)
            else:
                pairs[k] = pair
        if not pairs:
            return Round(round_number, {}, faults, time.monotonic() - started)
        owners, numbers = merge_top_documents(pairs, self.count)
        (reply,) = self._exchange_and_count_bytes(
            "judge", round_number, {client: {"owners": owners, "numbers": numbers}}, sizes
        ).values()
        if reply is None or reply.error:
            return Round(round_number, {}, {**faults, client: _failure_reason(reply)}, time.monotonic() - started)
        spent = time.monotonic() - started
        right = finite_or_nan(reply.config.get("accuracy"))
        result = ClientUpdate(math.nan, math.nan, len(questions), spent, sizes[0], sizes[1], accuracy=right)
        return Round(round_number, {client: result}, faults, spent)

    def _exchange_and_count_bytes(
        self, message_type: str, round_number: int, states: Mapping[int, State], byte_counts: list[int]
    ) -> dict[int, Reply | None]:
        """The reply of each of these clients to its state, None of one that was late; adds the bytes up and down."""
        config: dict[str, str | int | float | bool] = {"base": self.terms.base, "deadline": self.terms.deadline}
        sent = [
            Message(self.members[k].node, message_type, round_number, {"others": s} if s else {}, config)
            for k, s in states.items()
        ]
        replies = {r.node: r for r in send_and_receive(self.grid, sent, self.terms.deadline, self.terms.every)}
        byte_counts[0] += sum(r.bytes for r in replies.values())
        byte_counts[1] += sum(m.bytes for m in sent)
        return {k: replies.get(self.members[k].node) for k in states}


def _failure_reason(reply: Reply | None) -> str:
    if reply is None:
        return "no reply in time"
    return reply.error or "what it sent can't be used"


def _question_vectors_or_none(reply: Reply | None) -> np.ndarray | None:
    """Vectors of a reply, where they are that."""
    vectors = reply.arrays.get("own", {}).get("questions") if reply and not reply.error else None
    fits = isinstance(vectors, np.ndarray) and vectors.ndim == 2 and not value_fault("questions", vectors)
    return vectors if fits else None


def _scores_and_indices_or_none(
    reply: Reply | None, n_questions: int, count: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores and numbers of a reply, where they are that."""
    arrays = reply.arrays.get("own", {}) if reply and not reply.error else {}
    scores, numbers = arrays.get("scores"), arrays.get("numbers")
    if not isinstance(scores, np.ndarray) or not isinstance(numbers, np.ndarray) or scores.shape != numbers.shape:
        return None
    fits = scores.ndim == 2 and len(scores) == n_questions and 1 <= scores.shape[1] <= count
    return (scores, numbers) if fits and not value_fault("scores", scores) and numbers.dtype == np.int64 else None
