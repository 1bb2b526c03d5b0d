"""Router: prediction of the branch that a query needs, before anything is generated.

    router.safetensors    `weight` [branches, width + 2], `bias`, `mean`, `scale`; numbers about it in the metadata

For each branch the odds that its answer is right are a logistic regression over the query's vector and, where they tell
enough of questions held out to be worth a forward of the prompt, the model's margin and entropy at the first token. The
branch with the largest probability less `price` for each of its seconds is taken: reward - c * latency, with an
expected reward.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault
from ...core.json_errors import reject_on_error
from ...core.safe_read import parse_strict_json, refuse_irregular_file
from .cross_fitting import cross_fitting_folds
from .logistic import fit_logistic_regression
from .policy import BRANCHES, Branch, Point, SimulatedQuery, Trial, mean_point
from .scorer import LEAST_AUC, auc, weak_reward
from .signals import Signals

NAME, FORMAT = "router.safetensors", 1
PENALTIES = (0.003, 0.03, 0.3)  # dozens of questions and hundreds of coordinates: how strongly they are held back
_TELLING = 0.02  # of AUC, that the first token must add: a look is lost where no direct answer goes on from it
_SIGNALS = 2

broken_router = Fault("broken-router", "A file that was to hold a router does not.", exit="environment")


def features(vector: Tensor, query_signals: Signals | None) -> Tensor:
    """[width + 2] of one query; its vector is as the base compares them. Zeros stand for what nobody looked at."""
    return torch.cat(
        [vector, torch.tensor([query_signals.margin, query_signals.entropy] if query_signals else [0.0, 0.0])]
    )


@dataclass(frozen=True)
class Router:
    """
    weight, bias    [branches, width + 2], [branches]: log-odds that a branch's answer is right, of scaled features
    mean, scale     [width + 2] of the features that it was fitted on
    seconds         that each branch took on the dev set
    price           probability that a second is worth
    auc             over (question, branch) pairs, of questions that were held out
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    seconds: tuple[float, ...]
    price: float
    auc: float

    @property
    def needs_signals(self) -> bool:
        """Whether it asks for the model's signals at the first token."""
        return bool(self.weight[:, -_SIGNALS:].any())

    def probabilities_right(self, features: Tensor) -> Tensor:
        """Of features [n, width + 2], the probability that each branch is right, [n, branches]."""
        return (((features - self.mean) / self.scale) @ self.weight.T + self.bias).sigmoid()

    def branch(self, features: Tensor) -> Branch:
        """For features [width + 2]; the first of equals, which is the cheapest."""
        worth = self.probabilities_right(features[None])[0] - self.price * torch.tensor(self.seconds)
        return BRANCHES[int(worth.argmax())]

    def save(self, folder: Path) -> None:
        metadata = {"format": FORMAT, "seconds": self.seconds, "price": self.price, "auc": self.auc}
        parts = {"weight": self.weight, "bias": self.bias, "mean": self.mean, "scale": self.scale}
        save_file({n: t.contiguous() for n, t in parts.items()}, folder / NAME, {"router": json.dumps(metadata)})


def open_router(folder: Path, embedding_width: int) -> Router:
    """Read and check the router of a folder; `embedding_width` is that of a query's vector."""
    with reject_on_error(broken_router, f"{folder / NAME} holds no router", "emit the folder again"):
        refuse_irregular_file(folder / NAME)
        with safe_open(folder / NAME, "pt") as file:
            metadata = parse_strict_json(file.metadata()["router"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        router = Router(
            **tensors,
            seconds=tuple(map(float, metadata["seconds"])),
            price=float(metadata["price"]),
            auc=float(metadata["auc"]),
        )
        if metadata["format"] != FORMAT or len(router.seconds) != len(BRANCHES):
            raise ValueError("it has another form")
        if router.weight.shape != (len(BRANCHES), embedding_width + 2) or router.mean.shape != router.scale.shape:
            raise ValueError("it was fitted over another embedder")
        return router


def train_router(
    trials: Sequence[Trial], features: Tensor, price_per_second: float | None, *, seed: int = 0, force: bool = False
) -> Router:
    """Fitted on a dev set; `features` [n, width + 2] are the features of its questions.

    price_per_second    None for the least at which questions held out take no longer than by the better of always
                        `rag` and always `ttt`

    Reject (weak-reward) where questions held out are predicted no better than by a coin, unless `force`.
    """
    right = torch.tensor([[float(trial.right[b]) for b in BRANCHES] for trial in trials])  # [n, branches]
    blind = torch.cat([features[:, :-_SIGNALS], torch.zeros(len(features), _SIGNALS)], dim=1)
    looking, blindly = _best_penalty(features, right, seed), _best_penalty(blind, right, seed)
    area, features, penalty = looking if looking[0] >= blindly[0] + _TELLING else blindly
    if area < LEAST_AUC and not force:
        raise weak_reward(
            f"the router's AUC is {area:.3f} on dev questions held out",
            help="give more dev questions, take `policy: sequential`, or use `force: true`",
        ).rejection()
    seconds = tuple(sum(t.seconds[b] for t in trials) / len(trials) for b in BRANCHES)
    if price_per_second is None:
        price_per_second = _calibrated_price_per_second(
            _cross_validated_log_odds(features, right, penalty, seed).sigmoid(), right, trials
        )
    return Router(*_fit(features, right, penalty), seconds, price_per_second, area)


def _calibrated_price_per_second(probabilities: Tensor, right: Tensor, trials: Sequence[Trial]) -> float:
    """Choose the price of a second from chances [n, branches] of questions that their router has not seen."""
    seconds = torch.tensor([[trial.seconds[b] for b in BRANCHES] for trial in trials])  # [n, branches]
    mean = seconds.mean(0)
    better = max((1, 2), key=lambda b: (float(right[:, b].mean()), -float(mean[b])))
    dearest = 1 / max(float(mean.sort().values.diff().min()), 1e-6)  # a branch that is dearer is never worth as much
    for price in (0.0, *(dearest * 1.2**-at for at in range(59, -1, -1))):
        chosen = (probabilities - price * mean).argmax(1, keepdim=True)
        if float(seconds.gather(1, chosen).mean()) <= float(mean[better]):
            return price
    return dearest


def measure_router(router: Router, trials: Sequence[Trial], features: Tensor) -> Point:
    """Point of a router on a set of questions, without thresholds."""
    return mean_point(trials, [simulate_router(router, t, row) for t, row in zip(trials, features, strict=True)])


def simulate_router(router: Router, trial: Trial, features: Tensor) -> SimulatedQuery:
    """The branch that a router takes on a trial with these features [width + 2], and its seconds."""
    branch = router.branch(features)
    return SimulatedQuery(branch, trial.seconds[branch])


def _fit(features: Tensor, right: Tensor, penalty: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)  # of one question too
    # A vector's coordinates tell little each and are many: together they weigh as much as one of the two signals.
    scale = scale * torch.cat([torch.full((features.shape[1] - 2,), (features.shape[1] - 2) ** 0.5), torch.ones(2)])
    fitted = [fit_logistic_regression((features - mean) / scale, column, penalty) for column in right.T]
    return torch.stack([weight for weight, _ in fitted]), torch.tensor([bias for _, bias in fitted]), mean, scale


class _PenaltyChoice(NamedTuple):
    area: float
    features: Tensor
    penalty: float


def _best_penalty(features: Tensor, right: Tensor, seed: int) -> _PenaltyChoice:
    """The largest area over questions held out that some penalty reaches, the features, and that penalty."""
    areas = {
        penalty: _auc_of_log_odds(_cross_validated_log_odds(features, right, penalty, seed), right)
        for penalty in PENALTIES
    }
    penalty = max(areas, key=lambda p: areas[p])
    return _PenaltyChoice(areas[penalty], features, penalty)


def _cross_validated_log_odds(features: Tensor, right: Tensor, penalty: float, seed: int) -> Tensor:
    """Log-odds [n, branches] of every question, by a router that has not seen it."""
    log_odds = torch.zeros_like(right)
    for training, held_out in cross_fitting_folds(len(features), seed):
        if training:
            weight, bias, mean, scale = _fit(features[training], right[training], penalty)
            log_odds[held_out] = ((features[held_out] - mean) / scale) @ weight.T + bias
    return log_odds


def _auc_of_log_odds(values: Tensor, right: Tensor) -> float:
    """Area under the curve, of all branches together: knowing that one is better than another counts too."""
    return auc(values.flatten().tolist(), [bool(r) for r in right.flatten().tolist()])
