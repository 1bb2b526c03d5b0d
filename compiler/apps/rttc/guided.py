"""The client: a query through embedding, caches, branches and reward, to an answer and a decision.

Many queries may be on their way at once. One computes on the model at a time, but for answers by PyTorch that wait
together, which are one batch; the engine has turns of its own, so that it answers while PyTorch trains. Who trains has
the only turn until its adapters are kept: the same question that came meanwhile finds them.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Reject
from ...core.cache import canonical_json_sha256
from ...core.safe_read import parse_strict_json
from .adaptation import AdaptableModel, State
from .batching import Batcher
from .caching import StateCache
from .embedder import Embedder
from .generation import Cancelled, GeneratedText, Settings, generate_one
from .knowledge import Match
from .native_generator import NativeGenerator
from .policy import Branch, Decision, Policy, choose_answer
from .prompts import Message, Prompts
from .retrieval import Retriever, Unreachable
from .reward import Reward
from .router import Router, features
from .sample import parse_sample
from .signals import Signals, signals

_MINUTE = 60.0  # seconds after which a base is asked again for its version
_LOOK_SECONDS = 0.1  # between two looks at the cache of a query that waits to train


@dataclass(frozen=True)
class Answered:
    """`finish` is "stop" where the model ended, "length" at the limit."""

    text: str
    prompt_tokens: int
    new_tokens: int
    finish: str
    decision: Decision


@dataclass
class GuidedModel:
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
    adaptable: AdaptableModel | None = None
    router: Router | None = None
    generator: NativeGenerator | None = None

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.model, self.prompts, self.adaptable)
        self.training = threading.Lock()
        self._engine = threading.RLock()
        self._facts: Any = None
        self._queried_at = 0.0

    def answer_conversation(
        self,
        messages: Sequence[Message],
        settings: Settings = Settings(),
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Answered:
        """Answer a conversation. Raises Cancelled once `is_cancelled` says so; Reject where the prompt is too long."""
        return _GuidedQuery(self, list(messages), settings, is_cancelled).run()

    def generator_for_branch(self, branch: Branch = "direct") -> Any:
        """Generator for answers of this branch: the engine where it can."""
        spoken = self.generator and (self.generator.adapted if branch == "ttt" else self.generator.bare)
        return spoken or self.model

    def generate_answer(
        self, ids: list[int], settings: Settings, is_cancelled: Callable[[], bool], adapter_state: State | None = None
    ) -> GeneratedText:
        """An answer under the adapters of `adapter_state`, or of the bare model."""
        speaker = self.generator_for_branch("direct" if adapter_state is None else "ttt")
        if speaker is self.model:
            return self.batcher.generate_in_batch(ids, settings, is_cancelled, adapter_state)
        with self._engine:
            if adapter_state is not None:
                assert self.generator is not None, "the engine is a voice"
                self.generator.put(adapter_state)
            return generate_one(speaker, self.prompts, ids, settings, is_cancelled)

    def embedding_lock(self) -> AbstractContextManager[Any]:
        """Lock for embedding questions: that of the sentence encoder, or the model where it embeds itself."""
        encoder = getattr(self.embedder, "encoder", self.model)
        return (
            self.batcher.exclusive_model()
            if any(encoder is module for module in self.model.modules())
            else self._engine
        )

    def scoring_lock(self) -> AbstractContextManager[Any]:
        """Lock for scoring answers and for reading first tokens."""
        return self.batcher.exclusive_model() if self.generator is None else self._engine

    def refreshed_base_facts(self) -> Any:
        """Facts of the knowledge base, fetched again once a minute; a new version empties both caches. Raises
        Unreachable where none was ever reached."""
        if self._facts is None or time.monotonic() > self._queried_at + _MINUTE:
            self._queried_at = time.monotonic()
            try:
                self._replace_base_facts(self.retriever.facts())
            except Unreachable:
                if self._facts is None:
                    raise
        return self._facts

    def refresh_facts_if_version_changed(self, version: str) -> None:
        if self._facts is not None and version != self._facts.version:
            self._replace_base_facts(self.retriever.facts())

    def _replace_base_facts(self, facts: Any) -> None:
        if facts.embedder != self.embedder.identity:
            raise Unreachable("the knowledge base was embedded by another model than this client's, and is not asked")
        for cache in (self.lists, self.states):
            cache.drop_other_versions(facts.version)
        self._facts = facts


def cache_identity(model_identity: str, embedder_identity: str, base_version: str, adapter_shape: str) -> str:
    """Identity of all that cached states depend on.

    model_identity   hash of the folder's files and of how they belong together: weights, config, tokenizer, training
    base_version     of the knowledge base, or the address of its server
    adapter_shape    of the adapters
    """
    return canonical_json_sha256([model_identity, embedder_identity, base_version, adapter_shape])


class _GuidedQuery:
    """One on its way."""

    def __init__(
        self, client: GuidedModel, messages: list[Message], settings: Settings, is_cancelled: Callable[[], bool]
    ):
        self._client, self._messages, self._settings, self._is_cancelled = client, messages, settings, is_cancelled
        self._decision = Decision()
        self._answers: dict[Branch, tuple[GeneratedText, int]] = {}  # and how many tokens the prompt had
        self._matches: Sequence[Match] | None = None
        self._vector: Tensor | None = None
        self._state: State | None = None
        self._reuses = False
        self._stack = ExitStack()

    @property
    def _question(self) -> str:
        return self._messages[-1]["content"]

    def run(self) -> Answered:
        client, decision = self._client, self._decision
        try:
            if client.policy.kind != "direct":
                self._embed_question()
            policy = self._resolve_router(client.policy)
            self._reuses = policy.kind in ("sequential", "ttt")
            if self._answer_with_cached_state() is not None:
                decision.branch = "ttt"
            else:
                choose_answer(policy, self._answer_by_branch, self._score, decision)
                self._cache_adapter_state()
        except Reject as rejection:  # a reward without a number; the prompt was taken already
            if "direct" not in self._answers:
                raise
            decision.branch, decision.note = "direct", rejection.diagnostics[0].message
        finally:
            self._stack.close()
        generated, prompt_tokens = self._answers[decision.branch]
        return Answered(generated.text, prompt_tokens, generated.n_tokens, generated.finish_reason, decision)

    def _embed_question(self) -> None:
        """The query's vector, as the base compares them."""
        try:
            facts = self._client.refreshed_base_facts()
        except Unreachable as error:
            self._decision.note = str(error)
            return
        with self._client.embedding_lock(), self._timed("embed"):
            self._vector = facts.center_and_normalize(self._client.embedder.embed([self._question])[0])

    def _resolve_router(self, policy: Policy) -> Policy:
        """A router's choice, as a policy of that branch alone; without a vector there are no samples to go for."""
        if policy.kind != "router":
            return policy
        router = self._client.router
        assert router is not None, "a policy has its router"
        if self._vector is None:
            return replace(policy, kind="direct")
        with self._timed("route"):
            branch = router.branch(
                features(self._vector, self._first_token_signals() if router.needs_signals else None)
            )
        return replace(policy, kind=branch)

    def _first_token_signals(self) -> Signals:
        with self._client.scoring_lock():
            return signals(
                self._client.generator_for_branch(), self._client.prompts.tokenize_conversation(self._messages)
            )

    def _answer_with_cached_state(self) -> str | None:
        """An answer with the adapters of a query that was near enough; None where there was none."""
        if not self._reuses or self._vector is None or self._client.adaptable is None:
            return None
        self._state = self._client.states.find_nearest(self._vector)
        if self._state is None:
            return None
        self._decision.adapter_hit = True
        return self._generate("ttt", self._client.prompts.tokenize_conversation(self._messages))

    def _answer_by_branch(self, branch: Branch) -> str | None:
        if self._is_cancelled():
            raise Cancelled
        if branch == "direct":
            return self._generate(branch, self._client.prompts.tokenize_conversation(self._messages))
        matches = self._retrieve_samples_once()
        if not matches:
            return None
        if branch == "rag":
            examples = [match.sample for match in matches[: self._client.policy.shown]]
            ids = self._client.prompts.tokenize_with_samples(self._messages, examples, self._settings.max_tokens)
            return None if ids is None else self._generate(branch, ids)
        if self._client.adaptable is None:
            return None
        has_turn, known = False, None
        while not has_turn and known is None:
            has_turn = self._acquire_training_unless_cached()
            known = self._answer_with_cached_state()
        return self._answer_after_training(self._client.adaptable, matches) if known is None else known

    def _acquire_training_unless_cached(self) -> bool:
        """Wait for the turn to train. False, without the turn, once another query left adapters that are near enough:
        trainings of others may stand between."""
        training, states = self._client.training, self._client.states
        while not training.acquire(timeout=_LOOK_SECONDS):
            if self._is_cancelled():
                raise Cancelled
            if self._reuses and self._vector is not None and states.has_near_state(self._vector):
                return False
        self._stack.callback(training.release)
        return True

    def _answer_after_training(self, adaptable: AdaptableModel, matches: Sequence[Match]) -> str:
        with self._client.batcher.exclusive_model(), self._timed("train"):
            if self._is_cancelled():
                raise Cancelled
            try:
                scores = [match.score for match in matches]
                trained = adaptable.reset_and_train([match.sample for match in matches], scores, self._is_cancelled)
                self._state = adaptable.state()
            finally:
                adaptable.disable_adapters()
        self._decision.steps = len(trained.losses)
        return self._generate("ttt", self._client.prompts.tokenize_conversation(self._messages))

    def _retrieve_samples_once(self) -> Sequence[Match]:
        """Of an earlier query that was near enough, or of the base; none where it can't be reached."""
        if self._matches is None:
            self._matches = self._cached_or_retrieved_samples() if self._vector is not None else ()
            self._decision.samples = len(self._matches)
        return self._matches

    def _cached_or_retrieved_samples(self) -> Sequence[Match]:
        client, vector = self._client, self._vector
        assert vector is not None, "a query without a vector has no samples"
        if (cached := client.lists.find_nearest(vector)) is not None:
            self._decision.list_hit = True
            rows = parse_strict_json(bytes(cached["samples"].tolist()))
            return [Match(parse_sample(body), score) for body, score in rows]
        try:
            with self._timed("retrieve"):
                retrieved = client.retriever.retrieve(vector, client.policy.count)
            client.refresh_facts_if_version_changed(retrieved.version)
        except Unreachable as error:
            self._decision.note = str(error)
            return ()
        self._decision.bytes = retrieved.bytes
        rows = json.dumps([[match.sample.to_json(), match.score] for match in retrieved.matches]).encode()
        client.lists.put(vector, {"samples": torch.frombuffer(bytearray(rows), dtype=torch.uint8)})
        return retrieved.matches

    def _cache_adapter_state(self) -> None:
        """Keep the adapters whose answer was the best: worse ones would be found again."""
        if self._decision.branch != "ttt" or self._decision.adapter_hit:
            return
        if self._vector is not None and self._state is not None:
            self._client.states.put(self._vector, self._state)

    def _score(self, text: str) -> float:
        with self._client.scoring_lock(), self._timed("reward"):
            return self._client.reward.score(self._question, [text])[0]

    def _generate(self, branch: Branch, ids: list[int]) -> str:
        with self._timed(branch):
            state = self._state if branch == "ttt" else None
            generated = self._client.generate_answer(ids, self._settings, self._is_cancelled, state)
        self._answers[branch] = generated, len(ids)
        return generated.text

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to those of a part of the query."""
        started, seconds = time.monotonic(), self._decision.seconds
        try:
            yield
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started
