"""A small reward model of one's own: a linear head over the vectors of a question and an answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault
from ...core.cache import write_atomic
from ...core.json_errors import reject_on_error
from ...core.safe_read import CONFIG, DATA, parse_strict_json, read_json, read_regular_file, refuse_irregular_file
from .embedder import Embedder
from .logistic import fit_logistic_regression
from .reward import require_finite_scores
from .sample import invalid_samples

NAME, WEIGHTS, FORMAT = "scorer.json", "scorer.safetensors", 1
LEAST_AUC = 0.55  # below, a coin is about as good

weak_reward = Fault(
    "weak-reward",
    "A reward does not tell right answers from wrong ones, on samples held out.\n\n"
    "An AUC of 0.5 is a coin's. Routing by it is noise; train on more, or on samples of the own task, "
    "or insist with `force`.",
    exit="gate",
)
broken_scorer = Fault("broken-scorer", "A folder that was to hold a trained scorer does not.", exit="environment")


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer, and whether it was right."""

    question: str
    answer: str
    right: bool


def auc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Probability that a right answer scores above a wrong one, equals half; 0.5 where one kind is missing."""
    good = torch.tensor([s for s, r in zip(scores, right, strict=True) if r], dtype=torch.float64)
    negatives = torch.tensor([s for s, r in zip(scores, right, strict=True) if not r], dtype=torch.float64)
    if not len(good) or not len(negatives):
        return 0.5
    above = (good[:, None] > negatives).double() + 0.5 * (good[:, None] == negatives).double()
    return float(above.mean())


class Scorer:
    """Log-odds that an answer is right. `auc` is that on questions which it was not trained on."""

    name, scale = "scorer", "log-odds"

    def __init__(self, weight: Tensor, bias: float, embedder: Embedder, auc: float):
        self._weight, self._bias, self._embedder, self.auc = weight, bias, embedder, auc

    def score(self, question: str, answers: Sequence[str]) -> list[float]:
        features = _pair_features(self._embedder, [question] * len(answers), answers)
        return require_finite_scores((features @ self._weight + self._bias).tolist(), self.name)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weight": self._weight.contiguous()}, folder / WEIGHTS)
        body = {"format": FORMAT, "bias": self._bias, "auc": self.auc, "embedder": self._embedder.identity}
        write_atomic(folder / NAME, (json.dumps(body, indent=2, sort_keys=True) + "\n").encode())


def open_scorer(folder: Path, embedder: Embedder) -> Scorer:
    with reject_on_error(broken_scorer, f"{folder} holds no scorer for this embedder", "train it again"):
        refuse_irregular_file(folder / WEIGHTS)
        body, weight = read_json(folder / NAME, CONFIG), load_file(folder / WEIGHTS)["weight"]
        if body["format"] != FORMAT or body["embedder"] != embedder.identity or weight.shape != (4 * embedder.width,):
            raise ValueError("it was trained over another embedder")
        return Scorer(weight, float(body["bias"]), embedder, float(body["auc"]))


def train_logistic_scorer(
    labelled_answers: Sequence[LabelledAnswer],
    embedder: Embedder,
    *,
    seed: int = 0,
    validation_share: float = 0.25,
    l2_penalty: float = 1e-3,
    force: bool = False,
) -> Scorer:
    """Logistic regression, by L-BFGS. Questions are split, so that no question is on both sides.

    Reject (weak-reward) where the AUC on the held-out questions is below 0.55, unless `force`.
    """
    parts = split_by_question(labelled_answers, seed, validation_share)
    (x, y), (x_validation, _) = [
        (
            _pair_features(embedder, [g.question for g in part], [g.answer for g in part]),
            torch.tensor([float(g.right) for g in part]),
        )
        for part in parts
    ]
    weight, bias = fit_logistic_regression(x, y, l2_penalty)
    area = auc((x_validation @ weight + bias).tolist(), [g.right for g in parts[1]])
    refuse_weak_auc(area, parts[1], force)
    return Scorer(weight, bias, embedder, area)


def split_by_question(
    labelled_answers: Sequence[LabelledAnswer], seed: int, validation_share: float = 0.25
) -> tuple[list[LabelledAnswer], list[LabelledAnswer]]:
    """Training and held-out split: a share of the questions, with all of their answers."""
    questions = sorted({g.question for g in labelled_answers})
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    validation_questions = {questions[i] for i in order[: max(1, round(validation_share * len(questions)))]}
    return [g for g in labelled_answers if g.question not in validation_questions], [
        g for g in labelled_answers if g.question in validation_questions
    ]


def refuse_weak_auc(auc_value: float, validation: Sequence[LabelledAnswer], force: bool) -> None:
    """Reject (weak-reward) an area on answers held out that is near a coin's, unless `force`."""
    if auc_value < LEAST_AUC and not force:
        questions = len({g.question for g in validation})
        raise weak_reward(
            f"the scorer's AUC is {auc_value:.3f} on {len(validation)} answers to {questions} questions held out",
            help="grade more answers of the own task, or use `force`",
        ).rejection()


def _pair_features(embedder: Embedder, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
    """Features of pairs of vectors: both, their product and their distance by coordinate, [n, 4 * width]."""
    if not answers:
        return torch.empty(0, 4 * embedder.width)
    question_vectors, answer_vectors = embedder.embed(questions), embedder.embed(list(answers))
    return torch.cat(
        [
            question_vectors,
            answer_vectors,
            question_vectors * answer_vectors,
            (question_vectors - answer_vectors).abs(),
        ],
        dim=1,
    )


def read_labelled_answers(file: Path) -> list[LabelledAnswer]:
    """JSON lines with `question`, `answer` and `right`; Reject with the line that is none."""
    graded = []
    with reject_on_error(invalid_samples, f"{file} can't be read"):
        lines = read_regular_file(file, DATA).decode().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with reject_on_error(invalid_samples, f"line {number} of {file} is no graded answer"):
            body = parse_strict_json(line)
            if not isinstance(body, dict) or {"question", "answer", "right"} - body.keys():
                raise ValueError("it has not all of `question`, `answer` and `right`")
            if not isinstance(body["right"], bool):
                raise ValueError("`right` is neither true nor false")
            graded.append(LabelledAnswer(str(body["question"]), str(body["answer"]), body["right"]))
    if len({g.question for g in graded}) < 4:
        raise invalid_samples(f"{file} grades answers to fewer than 4 questions").rejection()
    return graded
