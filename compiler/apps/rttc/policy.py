"""Policy: the branch that answers a query, chosen by the reward of the answers so far."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

from ....dsl.syntax.json_types import make_range_predicate

Branch = Literal["direct", "rag", "ttt"]
BRANCHES: tuple[Branch, ...] = ("direct", "rag", "ttt")
Finite = Annotated[float, math.isfinite]
PlattScaling = Mapping[Branch, tuple[Finite, Finite]]


@dataclass(frozen=True)
class Policy:
    """
    kind           "sequential": stop at the first answer that is good enough; "best": make all three and take the
                   best (dear, the upper bound of what a reward can do); "router": one branch, predicted before
                   anything is generated; a branch's name: that one always
    direct, rag    rewards from which that answer is good enough; they belong to this model, reward and domain
    count          samples that are retrieved
    shown          of them in the prompt of a retrieval answer
    scales         by branch, slope and bias of the log-odds that an answer with some reward is right: thresholds are
                   then of that chance. Without them rewards are compared as they are
    """

    kind: Literal["sequential", "best", "router", "direct", "rag", "ttt"] = "sequential"
    direct: float = 0.0
    rag: float = 0.0
    count: Annotated[int, make_range_predicate(1, 256)] = 8
    shown: Annotated[int, make_range_predicate(1, 256)] = 4
    scales: PlattScaling = field(default_factory=dict)

    def comparable_score(self, branch: Branch, reward: float) -> float:
        """Score by which answers are compared: the chance that it is right, or its reward where that has no scale."""
        if branch not in self.scales:
            return reward
        slope, bias = self.scales[branch]
        return 0.5 + 0.5 * math.tanh((slope * reward + bias) / 2)  # the logistic function, which can't overflow so

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Decision:
    """Record of one query. `seconds`, `rewards` and `chances` that the answer is right, where rewards have
    scales, by branch; `note` says what went wrong on the way."""

    branch: Branch = "direct"
    rewards: dict[str, float] = field(default_factory=dict)
    chances: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    list_hit: bool = False
    adapter_hit: bool = False
    steps: int = 0
    bytes: int = 0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        body = asdict(self)
        for name in ("rewards", "chances", "seconds"):
            body[name] = {key: round(value, 6) for key, value in body[name].items()}
        return body


def stops_at_answer(policy: Policy, branch: Branch, comparable_score: float) -> bool:
    """Whether a sequential policy stops at this answer."""
    return branch == "ttt" or comparable_score >= (policy.direct if branch == "direct" else policy.rag)


def choose_answer(
    policy: Policy,
    answer_by_branch: Callable[[Branch], str | None],
    score_text: Callable[[str], float],
    decision: Decision,
) -> str:
    """Run the branches that the policy asks for, and give the best answer among them; the first of equals.

    answer_by_branch   makes a branch's answer; None where it can't (no server, no samples): the policy goes on without
                       it
    score_text         of an answer
    """
    assert policy.kind != "router", "a router's choice is a policy of one branch"
    if policy.kind in BRANCHES:
        only: Branch = policy.kind
        first_answer = answer_by_branch(only)
        decision.branch = only if first_answer is not None else "direct"
        return first_answer if first_answer is not None else answer_by_branch("direct") or ""
    texts: dict[Branch, str] = {}
    worth: dict[Branch, float] = {}
    for branch in BRANCHES:
        text = answer_by_branch(branch)
        if text is None:
            continue
        texts[branch] = text
        decision.rewards[branch] = score_text(text)
        worth[branch] = policy.comparable_score(branch, decision.rewards[branch])
        if policy.scales:
            decision.chances[branch] = worth[branch]
        if policy.kind == "sequential" and stops_at_answer(policy, branch, worth[branch]):
            break
    decision.branch = max(texts, key=worth.__getitem__)
    return texts[decision.branch]


@dataclass(frozen=True)
class Trial:
    """Result of a dev question: by branch, the reward, whether it was right, and the seconds it took."""

    rewards: Mapping[str, float]
    right: Mapping[str, bool]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """One pair of thresholds, and what the dev set says of it. `shares` of the branches whose answer was given;
    `scaled` where thresholds are of chances, not of rewards."""

    direct: float
    rag: float
    accuracy: float
    seconds: float
    shares: Mapping[str, float]
    scaled: bool = False


class SimulatedQuery(NamedTuple):
    branch: Branch
    seconds: float


def simulate_policy(trial: Trial, policy: Policy) -> SimulatedQuery:
    """The branch that a policy takes on a trial, and the seconds it spends until then."""
    decision, spent = Decision(), [0.0]

    def answer(branch: Branch) -> str | None:
        spent[0] += trial.seconds[branch]
        return branch

    choose_answer(policy, answer, lambda branch: trial.rewards[branch], decision)
    return SimulatedQuery(decision.branch, spent[0])


def measure(trials: Sequence[Trial], policy: Policy) -> Point:
    queries = [simulate_policy(trial, policy) for trial in trials]
    return mean_point(trials, queries, policy.direct, policy.rag, bool(policy.scales))


def mean_point(
    trials: Sequence[Trial],
    queries: Sequence[SimulatedQuery],
    direct: float = 0.0,
    rag: float = 0.0,
    scaled: bool = False,
) -> Point:
    """Means over trials, of the branch that each one's query took."""
    right = sum(trial.right[branch] for trial, (branch, _) in zip(trials, queries, strict=True)) / len(trials)
    shares: dict[str, float] = {name: sum(branch == name for branch, _ in queries) / len(queries) for name in BRANCHES}
    seconds = sum(s for _, s in queries) / len(trials)
    return Point(direct, rag, right, seconds, shares, scaled)


_STEPS = 9  # quantiles of the rewards that are tried as thresholds of a branch


def points_of_threshold_pairs(trials: Sequence[Trial], scales: PlattScaling | None = None) -> list[Point]:
    """Every pair of thresholds at quantiles of the dev set's rewards, "never stop" and "always stop" included."""
    plain = Policy(scales=scales or {})
    levels = {
        b: _threshold_candidates([plain.comparable_score(b, trial.rewards[b]) for trial in trials])
        for b in BRANCHES[:2]
    }
    return [measure(trials, replace(plain, direct=a, rag=b)) for a in levels["direct"] for b in levels["rag"]]


def calibrate_thresholds(
    trials: Sequence[Trial], price_per_second: float = 0.0, scales: PlattScaling | None = None
) -> tuple[Policy, list[Point]]:
    """The thresholds with the largest accuracy - price * seconds on a dev set, the cheapest of equals, and the curve.

    price_per_second    accuracy that a second is worth: 0.01 gives up one answer in a hundred for a second a query
    scales   rewards are compared as they are, and as chances by these; whichever the dev set says more for
    """
    points = points_of_threshold_pairs(trials) + (points_of_threshold_pairs(trials, scales) if scales else [])
    best = max(points, key=lambda p: (round(p.accuracy - price_per_second * p.seconds, 9), -p.seconds))
    return Policy(direct=best.direct, rag=best.rag, scales=scales or {} if best.scaled else {}), points


def _threshold_candidates(rewards: Sequence[float]) -> list[float]:
    ordered = sorted(rewards)
    inner = {ordered[min(len(ordered) - 1, at * len(ordered) // _STEPS)] for at in range(_STEPS)}
    span = max(1.0, ordered[-1] - ordered[0])
    return [ordered[0] - span, *sorted(inner), ordered[-1] + span]
