"""The client: one query at a time through embedding, caches, branches and reward, to an answer and a decision."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...dsl.diagnostics import Reject
from ..store.cache import digest
from ..store.regular import parse_json
from .adaptation import Adaptable, State
from .caching import StateCache
from .embedder import Embedder
from .generation import Cancelled, Settings, generate
from .knowledge import Match
from .policy import Branch, Decision, Policy, choose
from .prompts import Message, Prompts
from .retrieval import Retriever, Unreachable
from .reward import Reward
from .router import Router, features
from .sample import sample_of
from .signals import signals
from .voice import Voice


@dataclass(frozen=True)
class Answered:
    """`finish` is "stop" where the model ended, "length" at the limit."""

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: str
    decision: Decision


@dataclass(frozen=True)
class BranchAnswer:
    """One branch's answer."""

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: str


@dataclass
class Guided:
    """
    model      holds the adapters, and answers where there is no `voice`; `adaptable` is None where it can't be trained
    voice      the native engine, which answers in the model's place
    router     decides where the policy is "router"
    lists      of samples, by query; `states` of adapters, by query
    """

    model: Any
    prompts: Prompts
    embedder: Embedder
    retriever: Retriever
    reward: Reward
    policy: Policy
    lists: StateCache
    states: StateCache
    adaptable: Adaptable | None = None
    router: Router | None = None
    voice: Voice | None = None

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._facts: Any = None

    def ask(
        self, messages: Sequence[Message], settings: Settings = Settings(), stopped: Callable[[], bool] = lambda: False
    ) -> Answered:
        """Answer a conversation. Raises Cancelled once `stopped` says so; Reject where the prompt is too long."""
        with self._lock:
            return _Query(self, list(messages), settings, stopped).answer()

    def speaker(self, branch: Branch = "direct") -> Any:
        """What generates an answer of this branch: the engine where it can."""
        spoken = self.voice and (self.voice.adapted if branch == "ttt" else self.voice.bare)
        return spoken or self.model

    def put(self, state: State) -> None:
        """Answer with these adapters."""
        assert self.adaptable is not None, "only what can be trained has adapters"
        if self.voice is not None and self.voice.adapted is not None:
            self.voice.put(state)
        else:
            self.adaptable.put(state)

    def facts(self) -> Any:
        """Of the base; a new version empties both caches. Raises Unreachable where none was ever reached."""
        if self._facts is None:
            self._renew(self.retriever.facts())
        return self._facts

    def check_version(self, version: str) -> None:
        if self._facts is not None and version != self._facts.version:
            self._renew(self.retriever.facts())

    def _renew(self, facts: Any) -> None:
        if facts.embedder != self.embedder.identity:
            raise Unreachable("the knowledge base was embedded by another model than this client's, and is not asked")
        for cache in (self.lists, self.states):
            if self._facts is not None and facts.version != self._facts.version:
                cache.clear()
        self._facts = facts


def identity_of(base: str, embedder: str, version: str, shape: str) -> str:
    """What cached states belong to: the model's weights, the embedder, the base's version, the adapters' shape."""
    return digest([base, embedder, version, shape])


class _Query:
    """One on its way."""

    def __init__(self, client: Guided, messages: list[Message], settings: Settings, stopped: Callable[[], bool]):
        self._client, self._messages, self._settings, self._stopped = client, messages, settings, stopped
        self._decision = Decision()
        self._answers: dict[Branch, BranchAnswer] = {}
        self._matches: Sequence[Match] | None = None
        self._vector: Tensor | None = None

    @property
    def _question(self) -> str:
        return self._messages[-1]["content"]

    def answer(self) -> Answered:
        client, decision = self._client, self._decision
        try:
            if client.policy.kind != "direct":
                self._place()
            policy = self._routed(client.policy)
            if policy.kind in ("sequential", "ttt") and self._reuse():
                decision.branch = "ttt"
            else:
                choose(policy, self._branch, self._score, decision)
                self._remember()
        except Reject as refused:  # a reward without a number; the prompt was taken already
            if "direct" not in self._answers:
                raise
            decision.branch, decision.note = "direct", refused.diagnostics[0].message
        finally:
            if client.adaptable is not None:
                client.adaptable.off()
        made = self._answers[decision.branch]
        return Answered(made.text, made.prompt_tokens, made.new_tokens, made.finish, decision)

    def _place(self) -> None:
        """The query's vector, as the base compares them."""
        with self._timed("embed"):
            try:
                facts = self._client.facts()
                self._vector = facts.place(self._client.embedder.embed([self._question])[0])
            except Unreachable as error:
                self._decision.note = str(error)

    def _routed(self, policy: Policy) -> Policy:
        """A router's choice, as a policy of that branch alone; without a vector there are no samples to go for."""
        if policy.kind != "router":
            return policy
        assert self._client.router is not None, "a policy has its router"
        if self._vector is None:
            return replace(policy, kind="direct")
        with self._timed("route"):
            shown = signals(self._client.speaker(), self._client.prompts.ids(self._messages))
            branch = self._client.router.branch(features(self._vector, shown))
        return replace(policy, kind=branch)

    def _reuse(self) -> bool:
        """Answer with the adapters of a query that was near enough; False where there was none."""
        if self._vector is None or self._client.adaptable is None:
            return False
        state = self._client.states.find(self._vector)
        if state is None:
            return False
        self._decision.adapter_hit = True
        with self._timed("load"):
            self._client.put(state)
        self._generate("ttt", self._client.prompts.ids(self._messages))
        return True

    def _branch(self, branch: Branch) -> str | None:
        if self._stopped():
            raise Cancelled
        if branch == "direct":
            self._bare()
            return self._generate(branch, self._client.prompts.ids(self._messages))
        matches = self._samples()
        if not matches:
            return None
        if branch == "rag":
            self._bare()
            shown = [match.sample for match in matches[: self._client.policy.shown]]
            ids = self._client.prompts.with_samples(self._messages, shown, self._settings.most)
            return None if ids is None else self._generate(branch, ids)
        if self._client.adaptable is None:
            return None
        with self._timed("train"):
            trained = self._client.adaptable.train([m.sample for m in matches], [m.score for m in matches])
            if self._client.speaker("ttt") is not self._client.model:
                self._client.put(self._client.adaptable.state())
        self._decision.steps = len(trained.losses)
        return self._generate(branch, self._client.prompts.ids(self._messages))

    def _bare(self) -> None:
        if self._client.adaptable is not None:
            self._client.adaptable.off()

    def _samples(self) -> Sequence[Match]:
        """Of an earlier query that was near enough, or of the base; none where it can't be reached."""
        if self._matches is None:
            self._matches = self._look_up() if self._vector is not None else ()
            self._decision.samples = len(self._matches)
        return self._matches

    def _look_up(self) -> Sequence[Match]:
        client, vector = self._client, self._vector
        assert vector is not None, "a query without a vector has no samples"
        if (kept := client.lists.find(vector)) is not None:
            self._decision.list_hit = True
            rows = parse_json(bytes(kept["samples"].tolist()))
            return [Match(sample_of(body), score) for body, score in rows]
        try:
            with self._timed("retrieve"):
                found = client.retriever.retrieve(vector, client.policy.count)
            client.check_version(found.version)
        except Unreachable as error:
            self._decision.note = str(error)
            return ()
        self._decision.bytes = found.bytes
        rows = json.dumps([[match.sample.to_json(), match.score] for match in found.matches]).encode()
        client.lists.put(vector, {"samples": torch.frombuffer(bytearray(rows), dtype=torch.uint8)})
        return found.matches

    def _remember(self) -> None:
        """Keep the adapters whose answer was the best: worse ones would be found again."""
        if self._decision.branch == "ttt" and self._vector is not None and self._client.adaptable is not None:
            self._client.states.put(self._vector, self._client.adaptable.state())

    def _score(self, text: str) -> float:
        with self._timed("reward"):
            self._bare()  # a judge of its own likelihood is the bare model
            return self._client.reward.score(self._question, [text])[0]

    def _generate(self, branch: Branch, ids: list[int]) -> str:
        with self._timed(branch):
            made = generate(self._client.speaker(branch), self._client.prompts, ids, self._settings, self._stopped)
        self._answers[branch] = BranchAnswer(made[0], len(ids), made[1], made[2])
        return made[0]

    def _timed(self, name: str) -> "_Timer":
        return _Timer(self._decision.seconds, name)


class _Timer:
    """Adds the seconds of its block to a table."""

    def __init__(self, table: dict[str, float], name: str):
        self._table, self._name = table, name

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *raised: Any) -> None:
        self._table[self._name] = self._table.get(self._name, 0.0) + time.monotonic() - self._started
