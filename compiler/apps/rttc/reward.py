"""Rewards: scores of answers by a model or by a rule; higher is better, and the scale is each reward's own."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ....dsl.syntax.diagnostics import Fault
from ...models.rows.chat_template import render_template_or_reject
from ...models.rows.forward import continuation_logprobs, evaluating
from .prompts import Prompts

no_number = Fault(
    "reward-no-number",
    "A reward model gave NaN or infinity for an answer.\n\n"
    "Nothing can be decided by it. While a calibration runs this ends it; while queries are answered, "
    "the direct answer is given and the decision says so.",
    exit="failure",
)
no_judge = Fault(
    "no-reward-model",
    "A folder that was to hold a reward model holds none.\n\n"
    "A reward model is a sequence classifier with one output, as `save_pretrained` writes it.",
    exit="environment",
)


class Reward(Protocol):
    """`name` and `scale` are for people and for the record beside thresholds that were calibrated on it."""

    name: str
    scale: str

    def score(self, question: str, answers: Sequence[str]) -> list[float]:
        """One number an answer, finite; Reject (reward-no-number) where one is not."""


def require_finite_scores(scores: Sequence[float], reward_name: str) -> list[float]:
    for score in scores:
        if not math.isfinite(score):
            raise no_number(
                f"the reward `{reward_name}` gave {score}", help="calibrate with another reward"
            ).rejection()
    return list(scores)


class SelfLikelihood:
    """Mean log-probability of the answer's tokens, by the model that gave it.

    It knows when the model is unsure and not when it is wrong: its AUC on the own task says how far to trust it.
    """

    name, scale = "self", "nats a token, at most 0"

    def __init__(self, model: Any, prompts: Prompts):
        self._model, self._prompts = model, prompts

    def score(self, question: str, answers: Sequence[str]) -> list[float]:
        head = self._prompts.question(question)
        tails = [self._prompts.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
        nonempty = [(i, tail) for i, tail in enumerate(tails) if tail]
        sums = continuation_logprobs(self._model, [([*head, *tail], len(head)) for _, tail in nonempty])
        values = [-100.0] * len(answers)  # an empty answer is a bad one, and a finite number
        for (i, tail), total in zip(nonempty, sums, strict=True):
            values[i] = total / len(tail)
        return require_finite_scores(values, self.name)


class Judge:
    """A sequence classifier with one logit, asked with the question and the answer as its tokenizer writes a pair."""

    scale = "a logit"

    def __init__(self, folder: Path):
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        from ...models.checkpoints.auxiliary_models import open_model_with_head
        from ...models.checkpoints.model_folder import load_tokenizer, read_model_config, tokenizer_files_if_complete

        config = read_model_config(folder / "config.json", str(folder))
        if "auto_map" in config or not tokenizer_files_if_complete(folder):
            reason = "brings its own code" if "auto_map" in config else "has no tokenizer"
            raise no_judge(f"{folder} {reason}").rejection()
        model: Any = open_model_with_head(folder, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, str(folder))
        if model.config.num_labels != 1:
            raise no_judge(f"{folder} has {model.config.num_labels} outputs, and a reward is one").rejection()
        self.name = f"judge {folder.name}"
        self._model, self._tokenizer = model, load_tokenizer(folder, str(folder))

    def score(self, question: str, answers: Sequence[str]) -> list[float]:
        values = []
        for answer in answers:
            if getattr(self._tokenizer, "chat_template", None):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                text = render_template_or_reject(self._tokenizer, messages)
                inputs = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
            else:
                inputs = self._tokenizer(question, answer, return_tensors="pt", truncation=True)
            with evaluating(self._model):
                values.append(float(self._model(**inputs).logits[0, 0]))
        return require_finite_scores(values, self.name)


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The last number of a text, as answers to sums end with it."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


class Verifier:
    """Compares with what is known to be right: 1.0 or 0.0. An oracle, for measuring and for tasks that check.

    checker_name   "exact": the text but for case and spaces; "choice": the first word that is one of `options`;
                   "number": the last number; "pattern": the truth is a regular expression that is found
    """

    scale = "1 right, 0 wrong"

    def __init__(self, checker_name: str, truth_by_question: Mapping[str, str], options: Sequence[str] = ()):
        assert checker_name in ("exact", "choice", "number", "pattern"), f"no verifier is called {checker_name}"
        self.name, self._kind, self._truths, self._options = (
            f"verifier {checker_name}",
            checker_name,
            truth_by_question,
            options,
        )

    def score(self, question: str, answers: Sequence[str]) -> list[float]:
        truth = self._truths.get(question)
        return [0.0 if truth is None else float(self._is_right(truth, answer)) for answer in answers]

    def _is_right(self, truth: str, answer: str) -> bool:
        if self._kind == "number":
            actual, expected = last_number(answer), last_number(truth)
            return actual is not None and actual == expected
        if self._kind == "pattern":
            return re.search(truth, answer) is not None
        if self._kind == "choice":
            words = re.findall(r"\w+", answer.lower())
            options = [option.lower() for option in self._options]
            return next((word for word in words if word in options), None) == truth.strip().lower()
        return " ".join(answer.lower().split()) == " ".join(truth.lower().split())
