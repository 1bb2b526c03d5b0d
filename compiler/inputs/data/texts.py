"""Short texts, a row each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ...plugin.context import Context
from ...plugin.interfaces import param
from ..records import Record, field_text, parse_each, read_records, require_fields
from ..sampled_rows import SampledRows
from ..windows import read_text, require_tokenizer
from .labels import text_too_long


class Texts(SampledRows):
    """Short texts, a row each.

    As an embedder is given them: each with the special tokens that the tokenizer puts around it, cut after `length`
    and filled up behind; models that write no text are told where the filling begins. A record of a JSONL, JSON or
    CSV file has the text in a field; of any other file each line that is not empty is one. With two `fields`, all
    texts of the first come before all of the second, and `retrieval` asks which belong together.

    Source: own.
    Example: data questions = texts("questions.jsonl", fields: ["question", "answer"], length: 64)
    """

    rows_kind = "texts"
    padded = True

    path: str | tuple[str, ...] = param("File, glob, or list of them, relative to the recipe.", positional=True)
    fields: tuple[str, ...] = param("Fields of the text, one or two.", default=("text",))
    length: int = param("Tokens in a row, special tokens included.", ge=2, unit="tokens")
    longer: Literal["cut", "drop", "refuse"] = param("What becomes of records that fit into no row.", default="cut")
    samples: int | None = param("How many records; all of them where it is left out.", default=None, ge=1, unit="rows")

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        fill = tokenizer.pad_token_id if tokenizer is not None and tokenizer.pad_token_id is not None else 0
        ids_by_record = self._tokenize_and_sample_records(require_tokenizer(tokenizer, ctx), ctx)
        return iter([self._pad_to_length(ids, fill) for field in zip(*ids_by_record, strict=True) for ids in field])

    def prompts(self, tokenizer: Any, ctx: Context) -> Iterator[int]:
        ids_by_record = self._tokenize_and_sample_records(require_tokenizer(tokenizer, ctx), ctx)
        return iter([len(ids) for field in zip(*ids_by_record, strict=True) for ids in field])

    def _pad_to_length(self, ids: list[int], pad_id: int) -> Any:
        import torch

        return torch.tensor([*ids, *[pad_id] * (self.length - len(ids))])

    def _tokenize_and_sample_records(self, tokenizer: Any, ctx: Context) -> list[tuple[list[int], ...]]:
        """Ids of the texts of each record that is chosen."""
        import torch

        records = [
            tuple(
                tokenizer(text, verbose=False, truncation=self.longer == "cut", max_length=self.length)["input_ids"]
                for text in record
            )
            for path in self.files(ctx)
            for record in self._read_text_tuples(path)
        ]
        longest = max(len(ids) for record in records for ids in record)
        fitting = [record for record in records if max(map(len, record)) <= self.length]
        if len(fitting) < len(records) and (self.longer == "refuse" or not fitting):
            raise text_too_long(
                f"{len(records) - len(fitting)} of {len(records)} records exceed {self.length} tokens, the longest "
                f"{longest}",
                help=f"`length: {longest}`, or `longer: cut`",
            ).rejection()
        return [fitting[int(number)] for number in self.sample(torch.arange(len(fitting)), ctx)]

    def _read_text_tuples(self, path: Path) -> list[tuple[str, ...]]:
        if path.suffix not in (".jsonl", ".json", ".csv"):
            return [(line,) * len(self.fields) for line in read_text(path).splitlines() if line.strip()]
        records: list[Record] = read_records(path)
        require_fields(records, self.fields, path)
        return parse_each(
            enumerate(records, start=1),
            lambda entry: tuple(field_text(entry[1], n, entry[0], path) for n in self.fields),
        )
