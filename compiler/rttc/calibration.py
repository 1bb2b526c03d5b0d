"""Thresholds from a dev set: every branch answers every question once, and the curve says what each pair is worth."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...dsl.diagnostics import Reject
from .generation import Settings
from .guided import Guided
from .policy import BRANCHES, Decision, Point, Policy, Trial, calibrate
from .reward import Verifier
from .sample import Sample
from .scorer import LEAST_AUC, auc, weak_reward

PAIRS = 2000  # random pairs of samples whose nearness says what a false hit looks like


def trials(client: Guided, dev: Iterable[Sample], verifier: Verifier, settings: Settings) -> list[Trial]:
    """What each branch answers to each question, how the reward sees it, whether it was right, and its seconds.

    Seconds of a branch are those that a query adds when the branches before it were made already: without those of
    an embedding or a retrieval that another one has paid for.
    """
    found = []
    for sample in dev:
        rewards, right, seconds = {}, {}, {}
        for branch in BRANCHES:
            answered = _alone(client, sample.question, branch, settings)
            rewards[branch] = client.reward.score(sample.question, [answered.text])[0]
            right[branch] = verifier.score(sample.question, [answered.text])[0] > 0.5
            seconds[branch] = _own_seconds(branch, answered.decision)
        found.append(Trial(rewards, right, seconds))
    return found


def _alone(client: Guided, question: str, branch: str, settings: Settings) -> Any:
    only = replace(client, policy=replace(client.policy, kind=branch))
    return only.ask([{"role": "user", "content": question}], settings)


def _own_seconds(branch: str, decision: Decision) -> float:
    parts = {"direct": ("direct",), "rag": ("embed", "retrieve", "rag"), "ttt": ("train", "ttt")}[branch]
    return sum(decision.seconds.get(part, 0.0) for part in parts)


def aucs(found: Sequence[Trial]) -> dict[str, float]:
    """By branch and over all answers: how often the reward puts a right answer above a wrong one."""
    scores = {b: auc([t.rewards[b] for t in found], [t.right[b] for t in found]) for b in BRANCHES}
    every = [(t.rewards[b], t.right[b]) for t in found for b in BRANCHES]
    return {**scores, "all": auc([s for s, _ in every], [r for _, r in every])}


def fit(found: Sequence[Trial], policy: Policy, price: float, force: bool) -> tuple[Policy, list[Point]]:
    """The policy with thresholds of the dev set; Reject where the reward is no better than a coin."""
    whole = aucs(found)["all"]
    if whole < LEAST_AUC and not force and policy.kind in ("sequential", "best"):
        raise Reject(
            weak_reward(
                f"the reward's AUC is {whole:.3f} over {3 * len(found)} answers to dev questions",
                help="take another reward or dev set, a fixed policy such as `rag`, or `force: true`",
            )
        )
    chosen, points = calibrate(found, price)
    return replace(policy, direct=chosen.direct, rag=chosen.rag), points


def nearness(vectors: Tensor, seed: int = 0) -> dict[str, float]:
    """Cosines from which a query may take another's samples, and its adapters: what 1 in 100 and 1 in 1000 pairs of
    different samples pass. They belong to the embedder and the base."""
    if len(vectors) < 2:
        return {"lists": 1.01, "states": 1.01}
    draw = torch.Generator().manual_seed(seed)
    left = torch.randint(len(vectors), (PAIRS,), generator=draw)
    right = (left + torch.randint(1, len(vectors), (PAIRS,), generator=draw)) % len(vectors)
    cosines = (vectors[left] * vectors[right]).sum(-1)
    lists, states = torch.quantile(cosines, torch.tensor([0.99, 0.999])).tolist()
    return {"lists": min(lists, 0.999), "states": min(max(states, lists), 0.999)}


def oracle(found: Sequence[Trial]) -> float:
    """Accuracy of a choice that knows what is right."""
    return sum(any(t.right.values()) for t in found) / len(found)
