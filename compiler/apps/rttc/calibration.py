"""Thresholds from a dev set: every branch answers every question once, and the curve says what each pair is worth."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Diagnostic
from .cross_fitting import cross_fitted
from .drawing import svg_accuracy_chart, text_accuracy_chart
from .generation import Settings
from .guided import GuidedModel
from .policy import (
    BRANCHES,
    Branch,
    Decision,
    Point,
    Policy,
    SimulatedQuery,
    Trial,
    calibrate_thresholds,
    measure,
    simulate_policy,
)
from .reward import Reward, Verifier
from .router import Router, features, measure_router, simulate_router, train_router
from .sample import Sample
from .scaling import fit_platt_scaling, scaling_improves_accuracy
from .scorer import LEAST_AUC, auc, weak_reward
from .signals import signals

PAIRS = 2000  # random pairs of samples whose nearness says what a false hit looks like


def run_all_branches(
    client: GuidedModel, dev_samples: Iterable[Sample], verifier: Verifier, settings: Settings
) -> list[Trial]:
    """Answers of each branch to each question: reward, whether it was right, and seconds.

    Seconds of a branch are those that a query adds when the branches before it were made already: without those of
    an embedding or a retrieval that another one has paid for.
    """
    result = []
    for sample in dev_samples:
        rewards: dict[str, float] = {}
        right: dict[str, bool] = {}
        seconds: dict[str, float] = {}
        for branch in BRANCHES:
            answered = _answer_with_fixed_branch(client, sample.question, branch, settings)
            rewards[branch] = client.reward.score(sample.question, [answered.text])[0]
            right[branch] = verifier.score(sample.question, [answered.text])[0] > 0.5
            seconds[branch] = _measured_seconds(branch, answered.decision)
        result.append(Trial(rewards, right, seconds))
    return result


def _answer_with_fixed_branch(client: GuidedModel, question: str, branch: Branch, settings: Settings) -> Any:
    only = replace(client, policy=replace(client.policy, kind=branch))
    return only.answer_conversation([{"role": "user", "content": question}], settings)


def _measured_seconds(until_branch: str, decision: Decision) -> float:
    parts = {"direct": ("direct",), "rag": ("embed", "retrieve", "rag"), "ttt": ("train", "ttt")}[until_branch]
    return sum(decision.seconds.get(part, 0.0) for part in parts)


def auc_by_branch(trials_run: Sequence[Trial]) -> dict[str, float]:
    """AUC by branch and over all answers: how often the reward puts a right answer above a wrong one."""
    scores: dict[str, float] = {
        b: auc([t.rewards[b] for t in trials_run], [t.right[b] for t in trials_run]) for b in BRANCHES
    }
    all_pairs = [(t.rewards[b], t.right[b]) for t in trials_run for b in BRANCHES]
    return {**scores, "all": auc([s for s, _ in all_pairs], [r for _, r in all_pairs])}


def fit_and_check_policy(
    trials_run: Sequence[Trial], policy: Policy, price_per_second: float, force: bool
) -> tuple[Policy, list[Point]]:
    """The policy with thresholds of the dev set; Reject where the reward is no better than a coin."""
    total_auc = auc_by_branch(trials_run)["all"]
    if total_auc < LEAST_AUC and not force and policy.kind in ("sequential", "best"):
        raise _uninformative_reward_error(trials_run, total_auc).rejection()
    return fit_policy(trials_run, policy, price_per_second)


def fit_policy(trials_run: Sequence[Trial], policy: Policy, price_per_second: float) -> tuple[Policy, list[Point]]:
    """The policy with thresholds and scales of these trials, and the curve that they were chosen from."""
    scales = fit_platt_scaling(trials_run)
    chosen, points = calibrate_thresholds(trials_run, price_per_second, scales=scales)
    scales_used = (
        chosen.scales if policy.kind != "best" else scales if scaling_improves_accuracy(trials_run, scales) else {}
    )
    return replace(policy, direct=chosen.direct, rag=chosen.rag, scales=scales_used), points


def cross_fitted_point(trials_run: Sequence[Trial], policy: Policy, price_per_second: float, seed: int) -> Point:
    """Point of a policy fitted on all trials, each trial judged by thresholds and scales of other folds."""

    def fit(rows: Sequence[int]) -> Callable[[int], SimulatedQuery]:
        fitted = fit_policy([trials_run[row] for row in rows], policy, price_per_second)[0]
        return lambda row: simulate_policy(trials_run[row], fitted)

    return cross_fitted(measure(trials_run, policy), trials_run, fit, seed)


def cross_fitted_router_point(
    router: Router, trials_run: Sequence[Trial], features: Tensor, price_per_second: float | None, seed: int
) -> Point:
    """Point of a router, each trial judged by a router of other folds."""

    def fit(rows: Sequence[int]) -> Callable[[int], SimulatedQuery]:
        trials = [trials_run[row] for row in rows]
        fitted = train_router(trials, features[list(rows)], price_per_second, seed=seed, force=True)
        return lambda row: simulate_router(fitted, trials_run[row], features[row])

    return cross_fitted(measure_router(router, trials_run, features), trials_run, fit, seed)


def _uninformative_reward_error(trials_run: Sequence[Trial], auc_value: float) -> Diagnostic:
    """Why a reward is refused: it tells nothing, or there was nothing to tell apart."""
    right = [trial.right[branch] for trial in trials_run for branch in BRANCHES]
    sample_text = f"the {len(right)} answers to {len(trials_run)} dev questions"
    if not any(right):
        return weak_reward(
            f"none of {sample_text} is right, so no reward can tell right from wrong",
            help="look at `check`, `options` and `length`, train longer (`epochs`, `lr`), or take easier questions",
        )
    if all(right):
        return weak_reward(f"all of {sample_text} are right: nothing is to be decided", help="take `policy: direct`")
    return weak_reward(
        f"the reward's AUC is {auc_value:.3f} over {sample_text}, of which {sum(right)} are right",
        help="take another reward or dev set, a fixed policy such as `rag`, or `force: true`",
    )


def dev_features(client: GuidedModel, dev: Sequence[Sample]) -> Tensor:
    """Features of the dev questions for a router, [n, width + 2]."""
    vectors = client.refreshed_base_facts().center_and_normalize(
        client.embedder.embed([sample.question for sample in dev])
    )
    prompt_ids = [
        client.prompts.tokenize_conversation([{"role": "user", "content": sample.question}]) for sample in dev
    ]
    signals_of = [
        signals(client.generator_for_branch(), ids) for ids in prompt_ids
    ]  # as they are looked at when queries come
    return torch.stack([features(vector, one) for vector, one in zip(vectors, signals_of, strict=True)])


def points_by_price(router: Router, trials_run: Sequence[Trial], features: Tensor) -> list[Point]:
    """Points of the router at other prices of a second: from nothing to what makes the cheapest branch the only one."""
    least = min(router.seconds)
    gap = min((second - least for second in router.seconds if second > least), default=1.0)
    grid = [0.0, *(2.0**-at / gap for at in range(11, -1, -1))]
    return [measure_router(replace(router, price=price), trials_run, features) for price in grid]


def cache_hit_thresholds(vectors: Tensor, seed: int = 0) -> dict[str, float]:
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


def oracle_accuracy(trials_run: Sequence[Trial]) -> float:
    """Accuracy of a choice that knows what is right."""
    return sum(any(t.right.values()) for t in trials_run) / len(trials_run)


@dataclass(frozen=True)
class Calibration:
    """Thresholds calibrated on a dev set, with the measurements behind them.

    points    of the curve: pairs of thresholds, or prices of a router
    chosen    the one that was taken; its accuracy and seconds are of questions held out from what chose it
    best      of all three answers, by chances that were learned without the question
    auc       by branch, "all" and "router": areas under the curve
    """

    policy: Policy
    trials: Sequence[Trial]
    points: Sequence[Point]
    chosen: Point
    best: Point
    auc: Mapping[str, float]
    router: Router | None = None

    def write(self, destination: Path, reward: Reward) -> None:
        """`calibration.json`, its picture in SVG and in characters, and the router where there is one."""
        body = {
            "reward": reward.name,
            "scale": reward.scale,
            "auc": dict(self.auc),
            "oracle": oracle_accuracy(self.trials),
            "trials": [asdict(trial) for trial in self.trials],
            "curve": [asdict(point) for point in self.points],
            "chosen": asdict(self.chosen),
        }
        fixed: dict[str, Point] = {branch: measure(self.trials, Policy(branch)) for branch in BRANCHES}
        names = {**fixed, "best of all": self.best, f"policy {self.policy.kind}, held out": self.chosen}
        for suffix, content in (
            (".json", json.dumps(body, indent=1, sort_keys=True) + "\n"),
            (".svg", svg_accuracy_chart(self.points, names)),
            (".txt", text_accuracy_chart(self.points, names)),
        ):
            (destination / f"calibration{suffix}").write_text(content, encoding="utf-8")
        if self.router is not None:
            self.router.save(destination)


def calibrate_on_trials(
    client: GuidedModel,
    policy: Policy,
    dev: Sequence[Sample],
    trials_run: Sequence[Trial],
    price_per_second: float | None,
    seed: int,
    force: bool,
) -> Calibration:
    """The policy that a dev set's trials ask for.

    price_per_second    None is 0 for thresholds, and what `train_router` chooses for a router
    Reject (weak-reward) where a coin would choose as well."""
    areas, price = auc_by_branch(trials_run), price_per_second or 0.0
    if policy.kind != "router":
        fitted, points = fit_and_check_policy(trials_run, policy, price, force)
        chosen = cross_fitted_point(trials_run, fitted, price, seed)
        best = cross_fitted_point(trials_run, replace(fitted, kind="best"), price, seed)
        return Calibration(fitted, trials_run, points, chosen, best, areas)
    of = dev_features(client, dev)
    router = train_router(trials_run, of, price_per_second, seed=seed, force=force)
    points, areas = points_by_price(router, trials_run, of), {**areas, "router": router.auc}
    chosen = cross_fitted_router_point(router, trials_run, of, price_per_second, seed)
    return Calibration(policy, trials_run, points, chosen, measure(trials_run, Policy("best")), areas, router)
