"""Texts with a class each, for models that end in a head."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.nearest import nearest_name_help
from ...plugin.context import Context
from ...plugin.interfaces import param
from ..records import Record, drop_or_refuse_too_long, field_text, parse_each
from ..sampled_rows import SampledRows
from ..windows import padding_token_id, require_tokenizer

unknown_class = Fault("unknown-class", "A record's label is none of the classes that a recipe names.")
text_too_long = Fault("text-too-long", "A text has more tokens than a row.")


class Labels(SampledRows):
    """Texts with a class each, for models that end in a head.

    A record is a text and a label in two fields. A row is the text with the special tokens that the tokenizer puts
    around it, filled up behind to `length`. `tune.reft` learns the classes, the head along with the interventions;
    `accuracy` counts how often the likeliest class is the right one.

    Source: own; the task of GLUE (Wang et al. 2019, arXiv 1804.07461).
    Example: data reviews = labels("reviews.jsonl", classes: ["negative", "positive"], length: 64)
    """

    prompted = True
    padded = True

    path: str | tuple[str, ...] = param("JSONL, JSON, CSV or TSV file, glob, or list of them.", positional=True)
    text: str = param("Field of the text.", default="text")
    label: str = param("Field of the label.", default="label")
    classes: tuple[str, ...] = param(
        "Labels as records have them, in the order of the head's outputs.", least=2, distinct=True
    )
    length: int = param("Tokens in a row.", ge=2, unit="tokens")
    longer: Literal["refuse", "drop"] = param("What becomes of texts that fit into no row.", default="refuse")

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        fill = padding_token_id(tokenizer, ctx)
        return self._sample_tensor_rows(
            [[*ids, *[fill] * (self.length - len(ids))] for ids, _ in self._tokenize_texts_and_classes(tokenizer, ctx)],
            ctx,
        )

    def prompts(self, tokenizer: Any, ctx: Context) -> Iterator[int]:
        return (
            int(n)
            for n in self._sample_tensor_rows(
                [len(ids) for ids, _ in self._tokenize_texts_and_classes(tokenizer, ctx)], ctx
            )
        )

    def labels(self, tokenizer: Any, ctx: Context) -> Iterator[int]:
        return (
            int(n)
            for n in self._sample_tensor_rows(
                [number for _, number in self._tokenize_texts_and_classes(tokenizer, ctx)], ctx
            )
        )

    def _sample_tensor_rows(self, values: list, ctx: Context) -> Iterator[Any]:
        import torch

        return self.sample(torch.tensor(values), ctx)

    def _tokenize_texts_and_classes(self, tokenizer: Any, ctx: Context) -> list[tuple[list[int], int]]:
        """Ids and class of every text that fits."""
        tokenizer = require_tokenizer(tokenizer, ctx)

        def parse(entry: tuple[Record, int, Path]) -> tuple[list[int], int]:
            record, number, path = entry
            ids = tokenizer(field_text(record, self.text, number, path), verbose=False)["input_ids"]
            return ids, self._label_index(str(record[self.label]), number, path)

        items = parse_each(self.records((self.text, self.label), ctx), parse)
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
