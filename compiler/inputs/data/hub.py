"""Windows of tokens from a data set of the hub, or of local files in its formats."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.nearest import nearest_name_help
from ...core.cache import canonical_json_sha256
from ...core.environment import check_modules
from ...core.json_errors import first_line
from ...plugin.context import Context
from ...plugin.interfaces import Data, param
from ..records import invalid_record, no_field
from ..windows import encode, find_files, require_tokenizer, start_token_id, token_windows

_LONGEST = 193  # characters of ORG/NAME, 96 each
data_unreachable = Fault("data-unreachable", "A data set of the hub is needed and can't be had.", exit="network")
invalid_dataset = Fault("bad-dataset", "A data set can't be read, or has no such split or configuration.")

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class Hub(Data):
    """Windows of tokens from a data set of the hub, or of local files in its formats.

    The texts of one field are joined with an empty line between them, encoded as a whole and cut into rows of
    `length` tokens, as `text` does it. A name with a known ending or a leading `.` or `/` is a local file or
    folder. Loading scripts are never run.

    Source: the `datasets` library, `load_dataset`.
    Example: data wiki = hub("Salesforce/wikitext", config: "wikitext-2-raw-v1", split: "test", length: 512)
    """

    extra: ClassVar[str] = "data"
    requires: ClassVar[tuple[str, ...]] = ("datasets",)

    name: str = param("Data set, or a local json, jsonl, csv, parquet or txt file or folder.", positional=True)
    length: int = param("Tokens in a row, a start token included.", ge=2, unit="tokens")
    split: str = param("Which part; slices such as `train[:1%]` work.", default="train")
    config: str | None = param("Configuration of the data set.", default=None)
    revision: str | None = param("Branch, tag or commit of the data set.", default=None)
    field: str = param("Field that holds the text.", default="text")
    samples: int | None = param("How many rows; all of them where it is left out.", default=None, ge=1, unit="rows")
    seed: int | None = param("Decides which rows; the run's own seed where it is left out.", default=None)
    start: Literal["auto", "always", "never"] = param(
        "Whether rows begin with the start token; `auto` does what the tokenizer does.", default="auto"
    )

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        tokenizer = require_tokenizer(tokenizer, ctx)
        ids = encode("\n\n".join(self._read_texts(ctx)), tokenizer)
        seed = ctx.seed if self.seed is None else self.seed
        return token_windows(ids, self.length, start_token_id(tokenizer, self.start), self.samples, seed)

    def identity(self, ctx: Context) -> str:
        import hashlib

        content = hashlib.sha256()
        for text in self._read_texts(ctx):
            content.update(hashlib.sha256(text.encode()).digest())
        seed = (ctx.seed if self.seed is None else self.seed) if self.samples else 0
        return canonical_json_sha256(
            ["hub", content.hexdigest(), self.length, self.samples, seed, self.start, ctx.origin.tokenizer_identity]
        )

    def _read_texts(self, ctx: Context) -> list[str]:
        check_modules(self.requires, self.extra, "data hub")
        dataset = _load_dataset(self.name, self.config, self.split, self.revision, ctx.folder, ctx.settings.offline)
        if self.field not in dataset.column_names:
            raise no_field(
                f"`{self.name}` has no field `{self.field}`",
                help=nearest_name_help(self.field, dataset.column_names, "it has"),
            ).rejection()
        texts = dataset[self.field][:]
        if not all(isinstance(t, str) for t in texts):
            raise invalid_record(f"`{self.field}` of `{self.name}` is not text").rejection()
        return [t for t in texts if t]


@cache
def _load_dataset(
    name: str, config: str | None, split: str, revision: str | None, recipe_folder: Path, offline: bool
) -> Any:
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    how = datasets.DownloadConfig(local_files_only=offline)
    try:
        if local := _local_builder_and_files(name, recipe_folder):
            kind, files = local
            return datasets.load_dataset(kind, config, data_files=files, split=split)
        return datasets.load_dataset(name, config, split=split, revision=revision, download_config=how)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise data_unreachable(
            f"the data set `{name}` can't be had",
            help="check name and network, or name a local file",
            note=first_line(error),
        ).rejection() from error
    except (ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise invalid_dataset(
            f"`{name}` can't be read, or has no split `{split}`", note=first_line(error)
        ).rejection() from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _local_builder_and_files(name: str, recipe_folder: Path) -> tuple[str, list[str]] | None:
    """The builder and the files of a local name; None for a name of the hub."""
    path = Path(name).expanduser()
    if path.suffix not in FORMATS and not name.startswith((".", "/", "~")):
        if len(name) > _LONGEST:
            raise invalid_dataset(
                f"a name of the hub has at most {_LONGEST} characters, and this has {len(name)}"
            ).rejection()
        return None
    if os.path.isdir(recipe_folder / path):
        files = [f for f in sorted((recipe_folder / path).rglob("*")) if f.suffix in FORMATS]
        files = [f for f in files if f.suffix == files[0].suffix]
        if not files:
            raise invalid_dataset(f"{recipe_folder / path} holds no {', '.join(FORMATS)} file").rejection()
    else:
        files = find_files(name, recipe_folder)
    if files[0].suffix not in FORMATS:
        raise invalid_dataset(f"{files[0]} is none of {', '.join(FORMATS)}").rejection()
    return FORMATS[files[0].suffix], [str(f) for f in files]
