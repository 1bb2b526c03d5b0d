"""A sample of a knowledge base: what is put into a prompt, and what is trained on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....dsl.syntax.diagnostics import Fault
from ...core.json_errors import reject_on_error
from ...core.safe_read import DATA, parse_strict_json, read_regular_file

invalid_samples = Fault(
    "bad-samples",
    "A file of samples for a knowledge base can't be read.\n\n"
    'It is JSON lines, each `{"question": ..., "answer": ...}` or `{"text": ...}`; or a plain '
    "text, whose paragraphs are the samples.",
    exit="usage",
)

MAX_CHARACTERS = 8192  # of a sample: what a stranger put into a base can't make a training longer than this


@dataclass(frozen=True)
class Sample:
    """A question with its answer, or a text, whose question is ""."""

    question: str
    answer: str

    @property
    def text(self) -> str:
        return f"{self.question}\n{self.answer}" if self.question else self.answer

    @property
    def subject(self) -> str:
        """Text that queries are compared with."""
        return self.question or self.answer

    def to_json(self) -> dict[str, str]:
        return {"question": self.question, "answer": self.answer} if self.question else {"text": self.answer}


def parse_sample(body: Any) -> Sample:
    """Raises ValueError on what is none."""
    if isinstance(body, dict) and isinstance(body.get("text"), str) and body["text"].strip():
        sample = Sample("", body["text"])
    elif isinstance(body, dict) and all(
        isinstance(body.get(k), str) and body[k].strip() for k in ("question", "answer")
    ):
        sample = Sample(body["question"], body["answer"])
    else:
        raise ValueError("it has neither `question` and `answer` nor `text`")
    if len(sample.text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(sample.text)} characters, and at most {MAX_CHARACTERS} are taken")
    sample.text.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
    return sample


def read_samples(file: Path) -> Iterator[Sample]:
    """Samples of a file, in its order; Reject with the line that is none."""
    with reject_on_error(invalid_samples, f"{file} can't be read"):
        text = read_regular_file(file, DATA).decode()
    if file.suffix not in (".jsonl", ".json"):
        yield from (Sample("", part.strip()) for part in text.split("\n\n") if part.strip())
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            with reject_on_error(invalid_samples, f"line {number} of {file} is no sample"):
                yield parse_sample(parse_strict_json(line))


def without_duplicate_texts(samples: Iterable[Sample]) -> list[Sample]:
    """The first of those whose texts are the same but for case and spaces."""
    by_text: dict[str, Sample] = {}
    for sample in samples:
        by_text.setdefault(" ".join(sample.text.lower().split()), sample)
    return list(by_text.values())
