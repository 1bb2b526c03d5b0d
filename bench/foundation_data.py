"""Files of bench/foundation_tasks.py: texts of four subjects, verses for four clients, and questions with answers.

DATA is the folder that bench/reviews.py describes; the other texts are Python's documentation and those in recipes/zoo.
"""

import json
import pydoc_data.topics
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.reviews import sst2, write_rows

ZOO = Path(__file__).parents[1] / "recipes/zoo/tiny-llama"
SUBJECTS = ("docs", "reviews", "sums", "science")
TEXT_BYTES, TEST_BYTES = 300_000, 60_000  # of a subject, to learn from and to test on
SPEECH_OF_50 = (40, 30, 20, 10)  # verses of speech among the 50 of each client, the others are deeds
CLIENTS = tuple(f"client{number}" for number in range(len(SPEECH_OF_50)))
COLLECTIONS = ("ARC-Easy", "ARC-Challenge", "openbookqa", "gsm8k")
QUESTIONS = 120  # of each collection


def write_texts(folder: Path, data: Path) -> None:
    """`NAME.txt` and `NAME-test.txt` of every subject, with no text in common, and `bible-test.txt`."""
    # rows of SST-2's training file are parts of sentences, whose other parts would be in the test
    reviews = " ".join(row["text"] for split in ("test", "train") for row in sst2(data, split)[:6000])
    sums = [f"{question} {answer}" for question, answer in question_pairs(data, "gsm8k", 2000)]
    science = [f"{question} {answer}." for name in COLLECTIONS[:3] for question, answer in question_pairs(data, name)]
    topics = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    texts = dict(zip(SUBJECTS, (topics, reviews, "\n\n".join(sums), "\n\n".join(science)), strict=True))
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text[TEST_BYTES : TEST_BYTES + TEXT_BYTES], "utf-8")
        (folder / f"{name}-test.txt").write_text(text[:TEST_BYTES], "utf-8")
    (folder / "bible-test.txt").write_text((ZOO / "heldout.txt").read_text("utf-8"), "utf-8")


def write_verse_labels(folder: Path) -> None:
    """Verses for each client, as many of speech as `SPEECH_OF_50` has; `verses-test`, and `verses-wrong` of other answers."""
    lines = (ZOO / "speech-train.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    speech, deeds = ([row for row in rows if row["answer"] == answer] for answer in ("speech", "deed"))
    for name, count in zip(CLIENTS, SPEECH_OF_50, strict=True):
        write_rows(speech[:count] + deeds[: 50 - count], folder / f"{name}.jsonl")
        speech, deeds = speech[count:], deeds[50 - count :]
    test = [json.loads(line) for line in (ZOO / "speech-dev.jsonl").read_text("utf-8").splitlines()]
    other = {"speech": "deed", "deed": "speech"}
    write_rows(test, folder / "verses-test.jsonl")
    write_rows([row | {"answer": other[row["answer"]]} for row in test], folder / "verses-wrong.jsonl")


def write_questions(folder: Path, data: Path, seeds: Sequence[int]) -> None:
    """`questions-SEED.jsonl`: questions of all collections, one after another, with their answers as documents."""
    for seed in seeds:
        pairs = [
            pair for name in COLLECTIONS for pair in random.Random(seed).sample(question_pairs(data, name), QUESTIONS)
        ]
        rows = [{"question": question, "document": answer} for question, answer in pairs]
        write_rows(rows, folder / f"questions-{seed}.jsonl")


def question_pairs(data: Path, collection: str, count: int | None = None) -> list[tuple[str, str]]:
    """Questions of a collection and the texts of their right answers, no answer twice."""
    read = _sums if collection == "gsm8k" else _choices
    unique = {answer: question for question, answer in read(data, collection)}
    return [(question, answer) for answer, question in unique.items()][:count]


def _sums(data: Path, collection: str) -> Iterator[tuple[str, str]]:
    for line in (data / collection / "train.jsonl").read_text("utf-8").splitlines():
        item = json.loads(line)
        yield item["question"], item["answer"].partition("\n####")[0].replace("\n", " ")


def _choices(data: Path, collection: str) -> Iterator[tuple[str, str]]:
    """Stems of multiple-choice questions, and the texts of their right options."""
    for item in json.loads((data / "commonsense" / collection / "train.json").read_text("utf-8")):
        stem, _, options = item["instruction"].partition("question: ")[2].partition("\n\nAnswer1: ")
        options = "answer1: " + options.partition("\n\nAnswer format")[0]
        texts = options.replace(" Answer", " answer").split(" answer")
        by_number = {text.removeprefix("answer").partition(": ")[0]: text.partition(": ")[2] for text in texts}
        yield stem, by_number.get(item["answer"].removeprefix("answer"), "").rstrip(" .")
