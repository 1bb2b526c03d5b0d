"""Rows of one length from running text: reading, encoding, cutting, choosing."""

import codecs
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.syntax.diagnostics import Fault
from ...dsl.syntax.source_file import irregular_kind_of_path
from ..core.cache import canonical_json_sha256
from ..core.hashes import cached_file_hash
from ..core.safe_read import DATA, read_regular_file
from ..plugin.context import Context

if TYPE_CHECKING:
    import torch

no_file = Fault("no-file", "A file that a recipe names is not there.")
not_utf8 = Fault("not-utf8", "A text file is in another encoding than UTF-8.")
too_short = Fault(
    "too-short",
    "A data set has fewer tokens than its rows need.\n\n"
    "Rows are cut without overlap: `samples` rows of `length` tokens need that many tokens of text.",
)
no_tokenizer = Fault(
    "no-tokenizer", "Text is to become tokens and the model came without a tokenizer.", exit="environment"
)

_SAVED = "save what it gives in a file, and name that"  # of a pipe or a device, which can be read once at most
_INSTEAD = {"a folder": "name a file in it, or all of them, as in `texts/*.txt`"}
_SHORTEST = 8  # tokens in a row that are still worth a suggestion
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def find_files(paths: str | Sequence[str], folder: Path, relative_to: str = "the recipe") -> list[Path]:
    """Files by path or glob, relative to `folder`, in the order written and by name within a glob.

    relative_to   name of `folder` in diagnostics
    """
    result: list[Path] = []
    for text in [paths] if isinstance(paths, str) else paths:
        path = folder / Path(text).expanduser()
        if os.path.isfile(path):
            result.append(path)
            continue
        if kind := irregular_kind_of_path(path):
            raise no_file(f"{path} is {kind}, where a file is needed", help=_INSTEAD.get(kind, _SAVED)).rejection()
        matched = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not matched:
            fact = "no file matches" if glob.has_magic(text) else "there is no file"
            raise no_file(f"{fact} {path}", help=_file_suggestion(path, relative_to)).rejection()
        result += matched
    return list(dict.fromkeys(result))


def _file_suggestion(path: Path, relative_to: str) -> str:
    from ...dsl.syntax.nearest import nearest_name

    if not os.path.isdir(path.parent):
        return f"paths are relative to {relative_to}"
    closest = nearest_name(path.name, [f.name for f in path.parent.iterdir() if f.is_file()])
    return f"did you mean `{closest}`?" if closest else f"paths are relative to {relative_to}"


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, lines ended by "\\n" whatever ends them in the file, as Python's `open` reads it."""
    data = read_regular_file(path, DATA)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "latin1")
        is_binary = encoding == "latin1" and b"\0" in data
        convert = f"convert it: iconv -f {encoding} -t utf-8 {path.name}"
        raise not_utf8(
            f"{path} is not UTF-8 at byte {error.start} (0x{data[error.start]:02x})",
            help="it holds zero bytes, so it is no text: name another file" if is_binary else convert,
        ).rejection() from error


def require_tokenizer(tokenizer: Any, ctx: Context) -> Any:
    if tokenizer is None:
        raise no_tokenizer(
            f"{ctx.origin.label} has no tokenizer files",
            help="take a folder with tokenizer.json, or give token ids with `tokens`",
        ).rejection()
    return tokenizer


def padding_token_id(tokenizer: Any, ctx: Context) -> int:
    """Id that fills rows up: the padding token's, else the end token's. Raises Reject (no-tokenizer)."""
    tokenizer = require_tokenizer(tokenizer, ctx)
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def encode(text: str, tokenizer: Any) -> list[int]:
    """Ids of a whole text without any special token around it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def start_token_id(tokenizer: Any, start_option: str) -> int | None:
    """The id in front of every row: the tokenizer's own habit for "auto"."""
    if start_option == "never" or tokenizer.bos_token_id is None:
        return None
    habit = tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token_id if habit or start_option == "always" else None


def token_windows(
    ids: Sequence[int], length: int, start: int | None, samples: int | None, seed: int
) -> "Iterator[torch.Tensor]":
    """Rows of `length` ids without overlap, each behind `start`; the tail that fills no row is left out.

    With `samples`, that many of them in an order that the seed decides: fewer samples are a prefix of more.
    """
    import torch

    body = length - (start is not None)
    count = len(ids) // body if body else 0
    needed = samples or 1
    if count < needed:
        raise too_short(
            f"{len(ids)} tokens make {count} of {needed} rows of {length} tokens",
            help=_too_little_text_remedy(len(ids), count, needed, length, body),
        ).rejection()
    rows = torch.tensor(ids[: count * body], dtype=torch.int64).view(count, body)  # [count, body]
    if start is not None:
        rows = torch.cat([torch.full((count, 1), start), rows], dim=1)  # [count, length]
    return choose_rows(rows, samples, seed)


def choose_rows(rows: "torch.Tensor", samples: int | None, seed: int) -> "Iterator[torch.Tensor]":
    """All rows in order, or some in an order that the seed decides."""
    import torch

    if samples is None:
        return iter(rows)
    if samples > len(rows):
        raise too_short(f"{samples} rows are wanted, {len(rows)} are there", help=f"`samples: {len(rows)}`").rejection()
    generator = torch.Generator().manual_seed(seed)
    return iter(rows[torch.randperm(len(rows), generator=generator)[:samples]])


def _too_little_text_remedy(token_count: int, num_rows: int, needed_rows: int, length: int, row_tokens: int) -> str:
    """Remedy for too little text: fewer rows, shorter ones if long enough, or the amount of text needed."""
    if num_rows:
        return f"give more text, or `samples: {num_rows}`"
    longest = token_count // needed_rows + length - row_tokens
    shorter = f", or `length: {longest}`" if longest >= _SHORTEST else ""
    return f"give {row_tokens * needed_rows} tokens of text{shorter}"


def content_identity(word: str, files: Iterable[Path], facts: dict[str, Any], ctx: Context) -> str:
    """sha256 over a data word: its files, what it was told, and the tokenizer."""
    contents = [cached_file_hash(f, ctx.settings.cache_dir) for f in files]
    return canonical_json_sha256(
        {"word": word, "files": contents, "about": facts, "tokenizer": ctx.origin.tokenizer_identity}
    )
