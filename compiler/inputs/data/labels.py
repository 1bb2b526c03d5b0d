"""Texts with a class each, for models that end in a head."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.nearest import nearest_name_help
from ...plugin.context import Context
from ...plugin.interfaces import Data, param
from ..records import Record, check_fields, drop_or_refuse_too_long, parse_each, read_records, text_of
from ..windows import choose_rows, content_identity, find_files, padding_id, require_tokenizer

unknown_class = Fault("unknown-class", "A record's label is none of the classes that a recipe names.")
text_too_long = Fault("text-too-long", "A text has more tokens than a row.")


class Labels(Data):
    """Texts with a class each, for models that end in a head.

    A record is a text and a label in two fields. A row is the text with the special tokens that the tokenizer puts
    around it, filled up behind to `length`. `tune.reft` learns the classes, the head along with the interventions;
    `accuracy` counts how often the likeliest class is the right one.

    Source: own; the task of GLUE (Wang et al. 2019, arXiv 1804.07461).
    Example: data reviews = labels("reviews.jsonl", classes: ["negative", "positive"], length: 64)
    """

    reads = {"path": ("file",)}
    prompted = True

    path: str | tuple[str, ...] = param("JSONL, JSON, CSV or TSV file, glob, or list of them.", positional=True)
    text: str = param("Field of the text.", default="text")
    label: str = param("Field of the label.", default="label")
    classes: tuple[str, ...] = param(
        "Labels as records have them, in the order of the head's outputs.", least=2, distinct=True
    )
    length: int = param("Tokens in a row.", ge=2, unit="tokens")
    longer: Literal["refuse", "drop"] = param("What becomes of texts that fit into no row.", default="refuse")
    samples: int | None = param("How many rows; all of them where it is left out.", default=None, ge=1, unit="rows")
    seed: int | None = param("Decides which rows; the run's own seed where it is left out.", default=None)

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        fill = padding_id(tokenizer, ctx)
        return self._choose(
            [[*ids, *[fill] * (self.length - len(ids))] for ids, _ in self._tokenize_texts_and_classes(tokenizer, ctx)],
            ctx,
        )

    def prompts(self, tokenizer: Any, ctx: Context) -> Iterator[int]:
        return (
            int(n) for n in self._choose([len(ids) for ids, _ in self._tokenize_texts_and_classes(tokenizer, ctx)], ctx)
        )

    def labels(self, tokenizer: Any, ctx: Context) -> Iterator[int]:
        return (
            int(n)
            for n in self._choose([number for _, number in self._tokenize_texts_and_classes(tokenizer, ctx)], ctx)
        )

    def _choose(self, values: list, ctx: Context) -> Iterator[Any]:
        import torch

        return choose_rows(torch.tensor(values), self.samples, ctx.seed if self.seed is None else self.seed)

    def _tokenize_texts_and_classes(self, tokenizer: Any, ctx: Context) -> list[tuple[list[int], int]]:
        """Ids and class of every text that fits."""
        tokenizer, items = require_tokenizer(tokenizer, ctx), []
        for path in find_files(self.path, ctx.folder):
            records = read_records(path)
            check_fields(records, (self.text, self.label), path)

            def parse(numbered: tuple[int, Record], path: Path = path) -> tuple[list[int], int]:
                number, record = numbered
                ids = tokenizer(text_of(record, self.text, number, path), verbose=False)["input_ids"]
                return ids, self._label_index(str(record[self.label]), number, path)

            items += parse_each(enumerate(records, start=1), parse)
        return drop_or_refuse_too_long(
            items, [len(ids) for ids, _ in items], self.length, self.longer, text_too_long, "texts"
        )

    def _label_index(self, label: str, line_number: int, path: Path) -> int:
        if label not in self.classes:
            raise unknown_class(
                f"the label of record {line_number} of {path} is `{label}`",
                help=nearest_name_help(label, self.classes, "`classes` has"),
            ).rejection()
        return self.classes.index(label)

    def identity(self, ctx: Context) -> str:
        facts = {name: getattr(self, name) for name in ("text", "label", "classes", "length", "longer", "samples")}
        facts["seed"] = (ctx.seed if self.seed is None else self.seed) if self.samples else 0
        return content_identity("labels", find_files(self.path, ctx.folder), facts, ctx)
