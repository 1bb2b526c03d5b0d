"""Questions with several answers of which one is right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...plugin.context import Context
from ...plugin.interfaces import param
from ..records import Record, field_text, invalid_record, parse_each
from ..sampled_rows import SampledRows
from ..windows import encode, require_tokenizer, start_token_id, token_windows


@dataclass(frozen=True)
class Item:
    """A question as token ids [start, prompt, option] per option; option i begins at `begins[i]`."""

    rows: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]  # characters of each option
    answer: int


class Choices(SampledRows):
    """Questions with several answers of which one is right.

    A record has a question, its options and the answer. Options are a list in one field (or a dict with `text`
    and `label` lists), or the texts of several fields, or with `fixed` the same for every record. The answer is
    a number from 0, a label, a letter (A is the first), the name of the option's field, or the option's text.
    As rows for calibration or healing, questions with their right answers follow each other.

    Source: the request layout of EleutherAI's lm-evaluation-harness, `multiple_choice`.
    Example: data arc = choices("arc.jsonl", options: "choices", answer: "answerKey", length: 256)
    """

    rows_kind = "questions with options"

    path: str | tuple[str, ...] = param("JSONL, JSON, CSV or TSV file, glob, or list of them.", positional=True)
    question: str = param("Field of the question.", default="question")
    options: str | tuple[str, ...] = param("Field of the list of options, or a list of fields.", default="options")
    fixed: tuple[str, ...] | None = param("Options that every record has, in place of a field.", default=None)
    answer: str = param("Field of the answer.", default="answer")
    layout: Literal["qa", "plain"] = param(
        "`qa` writes `Question: …`, a line end and `Answer:`; `plain` the question alone.", default="qa"
    )
    samples: int | None = param("How many questions; all of them where it is left out.", default=None, ge=1)
    length: int = param("Tokens in a row, where it is used as rows.", default=256, ge=2, unit="tokens")

    def tokenize_questions(self, tokenizer: Any, ctx: Context) -> list[Item]:
        """The questions for scoring: every option behind its question."""
        tokenizer = require_tokenizer(tokenizer, ctx)
        start = start_token_id(tokenizer, "auto")
        front = [] if start is None else [start]
        items = []
        for prompt, options, answer in self._read_and_sample_questions(ctx):
            rows = [(*front, *encode(f"{prompt} {option}", tokenizer)) for option in options]
            begin = max(len(front) + len(encode(prompt, tokenizer)), 1)
            starts = tuple(min(begin, len(row) - 1) for row in rows)
            items.append(Item(tuple(rows), starts, tuple(max(len(o), 1) for o in options), answer))
        return items

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        tokenizer = require_tokenizer(tokenizer, ctx)
        text = "\n\n".join(
            f"{prompt} {options[answer]}" for prompt, options, answer in self._read_and_sample_questions(ctx)
        )
        return token_windows(encode(text, tokenizer), self.length, start_token_id(tokenizer, "auto"), None, 0)

    def _read_and_sample_questions(self, ctx: Context) -> list[tuple[str, list[str], int]]:
        """(prompt, options, index of the right one) for the questions that `samples` leaves."""
        import torch

        fields = () if self.fixed else (self.options,) if isinstance(self.options, str) else self.options
        records = self.records((self.question, *fields, self.answer), ctx)
        questions = parse_each(records, lambda entry: self._parse_record(*entry))
        if self.samples is None or self.samples >= len(questions):
            return questions
        return [questions[int(number)] for number in self.sample(torch.arange(len(questions)), ctx)]

    def _parse_record(self, record: Record, line_number: int, path: Path) -> tuple[str, list[str], int]:
        options, labels = self._parse_options(record, line_number, path)
        if len(options) < 2 or not all(isinstance(o, str) and o for o in options):
            raise invalid_record(f"record {line_number} of {path} has no two options that are text").rejection()
        answer = answer_index_labels_first(record[self.answer], options, labels)
        if answer is None:
            raise invalid_record(
                f"the answer of record {line_number} of {path} is none of its {len(options)} options",
                help="an answer is a number from 0, a label, a letter or an option's text",
            ).rejection()
        question = field_text(record, self.question, line_number, path)
        return (f"Question: {question}\nAnswer:" if self.layout == "qa" else question), options, answer

    def _parse_options(self, record: Record, line_number: int, path: Path) -> tuple[list[Any], list[str]]:
        if self.fixed:
            return list(self.fixed), []
        if not isinstance(self.options, str):
            return [field_text(record, name, line_number, path) for name in self.options], list(self.options)
        options = record[self.options]
        if isinstance(options, dict) and isinstance(options.get("text"), list):
            return options["text"], [str(label) for label in options.get("label") or ()]
        return (options if isinstance(options, list) else []), []


def answer_index_labels_first(answer: Any, options: Sequence[str], labels: Sequence[str]) -> int | None:
    """Index of the option that an answer means; None where it means none. Labels win over texts, texts over numbers."""
    if isinstance(answer, bool):
        answer = str(answer).lower()
    text = str(answer).strip()
    for known in (labels, options):
        if text in known:
            return list(known).index(text)
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    position = ord(text.upper()) - ord("A") if len(text) == 1 and text.isascii() else -1
    return position if 0 <= position < len(options) else None
