"""Classification tasks as texts with a label each: reviews of films, topics of news, sarcasm of headlines.

sst2      a folder with train.tsv and test.tsv, "sentence" and "label" (data/SST-2 of github.com/forest-snow/alps)
agnews    a folder with dev.tsv and test.tsv, text and topic, without a header (data/agnews there)
sarcasm   the wheel evals 3.0.1.post1, which holds headlines of news and of satire
"""

import json
import random
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

Example = tuple[str, str]  # text, label
TRAIN_ROWS, JUDGE_ROWS, TEST_ROWS = 8000, 256, 1000
NEWS_WORDS = 12  # of a text that stay: a topic shows in its first sentence, and steps take time by the token


def examples_of_lines(lines: Iterable[str]) -> list[Example]:
    parts = (line.rpartition("\t") for line in lines if line)
    return [(text.strip(), label.strip()) for text, _, label in parts]


def read_reviews(folder: Path) -> tuple[list[Example], list[Example]]:
    train, test = ((folder / f"{name}.tsv").read_text("utf-8").splitlines()[1:] for name in ("train", "test"))
    return examples_of_lines(train), examples_of_lines(test)


def read_news(folder: Path) -> tuple[list[Example], list[Example]]:
    train, test = (examples_of_lines((folder / f"{n}.tsv").read_text("utf-8").splitlines()) for n in ("dev", "test"))
    return truncate_texts(train), truncate_texts(test)


def truncate_texts(examples: list[Example]) -> list[Example]:
    return [(" ".join(text.split()[:NEWS_WORDS]), label) for text, label in examples]


def read_headlines(wheel: Path) -> tuple[list[Example], list[Example]]:
    """Headlines apart; those of the file's end are for the test."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("evals/registry/data/sarcasm/samples.jsonl").decode("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    examples = [(record["input"][1]["content"], record["ideal"]) for record in records]
    return examples[:-TEST_ROWS], examples[-TEST_ROWS:]


READERS: dict[str, Callable[[Path], tuple[list[Example], list[Example]]]] = {
    "sst2": read_reviews,
    "agnews": read_news,
    "sarcasm": read_headlines,
}


def write_task(task: str, source: Path, folder: Path) -> list[str]:
    """Write train.jsonl, judge.jsonl and test.jsonl, no text in two of them, and return the classes."""
    train, test = READERS[task](source)
    test = sorted(random.Random(0).sample(test, min(TEST_ROWS, len(test))), key=lambda row: len(row[0]))  # less padding
    unread = {text for text, _ in test}
    distinct = sorted({text: label for text, label in train if text not in unread}.items())
    train = random.Random(0).sample(distinct, TRAIN_ROWS + JUDGE_ROWS)
    folder.mkdir(parents=True, exist_ok=True)
    for name, examples in {"train": train[JUDGE_ROWS:], "judge": train[:JUDGE_ROWS], "test": test}.items():
        records = [{"text": text, "label": label} for text, label in examples]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    return sorted({label for _, label in train})
