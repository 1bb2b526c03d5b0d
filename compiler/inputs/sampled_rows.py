"""Rows of files, all of them or some: what the words for data in files share."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..plugin.context import Context
from ..plugin.interfaces import Data, param
from .records import Record, read_records, require_fields
from .windows import choose_rows, content_identity, find_files


class SampledRows(Data):
    """Rows of the files at `path`: all of them in order, or some that a seed chooses."""

    reads = {"path": ("file",)}

    samples: int | None = param("How many rows; all of them where it is left out.", default=None, ge=1, unit="rows")
    seed: int | None = param("Decides which rows; the run's own seed where it is left out.", default=None)

    def files(self, ctx: Context) -> list[Path]:
        return find_files(vars(self)["path"], ctx.folder)

    def records(self, fields: Sequence[str], ctx: Context) -> list[tuple[Record, int, Path]]:
        """Records of all files, each with its number and its file. Raises Reject where one lacks a field."""
        numbered: list[tuple[Record, int, Path]] = []
        for path in self.files(ctx):
            records = read_records(path)
            require_fields(records, fields, path)
            numbered += [(record, number, path) for number, record in enumerate(records, start=1)]
        return numbered

    def sampling_seed(self, ctx: Context) -> int:
        return ctx.seed if self.seed is None else self.seed

    def sample(self, rows: Any, ctx: Context) -> Iterator[Any]:
        """Rows [n, ...] as `samples` and the seed choose them."""
        return choose_rows(rows, self.samples, self.sampling_seed(ctx))

    def identity_facts(self, ctx: Context) -> dict[str, Any]:
        """All parameters but the path; the seed where it chooses. Baselines, locks and caches of earlier versions hold
        the digest of these, so that a new parameter is left out where it has its default."""
        facts = {name: value for name, value in vars(self).items() if name != "path"}
        return facts | {"seed": self.sampling_seed(ctx) if self.samples else 0}

    def identity(self, ctx: Context) -> str:
        return content_identity(type(self).__name__.lower(), self.files(ctx), self.identity_facts(ctx), ctx)
