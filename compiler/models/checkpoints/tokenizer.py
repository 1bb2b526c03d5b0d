"""A folder's tokenizer: its files checked before the tokenizers library reads them, texts cut into tokens in another
process, the library's panics made diagnostics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from ....dsl.syntax.diagnostics import Reject
from ...core.json_errors import first_line
from ...core.safe_read import CONFIG, MALFORMED, TOKENIZER, read_json, read_regular_file, refuse_irregular_file
from .checkpoint import without_library_logs
from .config_classes import is_known_tokenizer_class
from .limited_tokenizer import LimitedTokenizer, invalid_tokenizer
from .source_files import link_root_of
from .tokenizer_checks import TEMPLATES, refuse_unbounded_tokenizer_json, refuse_unknown_added_token_fields
from .tokenizer_pieces import refuse_unbounded_sentencepiece, refuse_unbounded_tekken, refuse_unbounded_tiktoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAST_TOKENIZER = "tokenizer.json"
_READ = (".json", ".jinja", ".txt", ".model", ".spm", ".tiktoken")  # what transformers reads of a folder for one
TOKENS = ("tokenizer_config.json", "special_tokens_map.json")
_CALLS = ("_encode_plus", "_decode", "convert_tokens_to_string")  # by which a tokenizer runs the library


def load_checked_tokenizer(folder: Path, label: str, trusted: bool = False) -> Any:
    """The tokenizer of a folder. Reject (bad-tokenizer) where its files are damaged, or ask for what none needs."""
    files = () if trusted else _checked_file_fields_of_config(folder, label)
    _refuse_malformed_tokenizer_files(folder, label)
    try:
        with without_library_logs(), tokenizer_panics_as_diagnostics(label):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trusted, **dict.fromkeys(files)
            )
    except Reject:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        if isinstance(error, (MemoryError, RecursionError)):
            raise
        raise invalid_tokenizer(
            f"{label}: the tokenizer files in {folder} can't be read", help="fetch them again", note=first_line(error)
        ).rejection() from error
    if tokenizer.is_fast and not trusted:
        tokenizer._tokenizer = LimitedTokenizer(tokenizer._tokenizer, label)
    return _with_panics_as_diagnostics(tokenizer, label)


def _tokenizer_files_with_checks(folder: Path) -> Iterator[tuple[Path, Callable[[Path], None]]]:
    """Files of a folder that a library makes a tokenizer of, each with what refuses it by `MALFORMED`."""
    for path in sorted(folder.iterdir()):
        name = path.name
        if name == FAST_TOKENIZER:
            yield path, lambda file: refuse_unbounded_tokenizer_json(read_json(file, TOKENIZER))
        elif name in TOKENS:
            yield path, lambda file: refuse_unknown_added_token_fields(read_json(file, CONFIG))
        elif "tekken" in name and path.suffix == ".json":
            yield path, lambda file: refuse_unbounded_tekken(read_json(file, TOKENIZER))
        elif "tiktoken" in name:
            yield path, lambda file: refuse_unbounded_tiktoken(read_regular_file(file, TOKENIZER))
        elif ".model" in name.removeprefix("model") or path.suffix == ".spm":
            yield path, lambda file: refuse_unbounded_sentencepiece(read_regular_file(file, TOKENIZER))


def _refuse_malformed_tokenizer_files(folder: Path, label: str) -> None:
    for path in (*folder.iterdir(), *folder.glob(TEMPLATES)):
        if path.suffix in _READ:
            refuse_irregular_file(path, TOKENIZER, link_root_of(folder))
    for path, reading in _tokenizer_files_with_checks(folder):
        try:
            reading(path)
        except (OSError, *MALFORMED) as error:
            raise invalid_tokenizer(
                f"{label}: {path} describes no tokenizer that is taken",
                help="fetch it again, from somebody whom you trust",
                note=first_line(error),
            ).rejection() from error


@contextmanager
def tokenizer_panics_as_diagnostics(label: str) -> Iterator[None]:
    """The library's panics as Reject (bad-tokenizer): they are no Exception, and would end a server's thread."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # its class can't be imported
            raise
        raise invalid_tokenizer(
            f"{label}: the model's tokenizer breaks at a text",
            help="fetch the tokenizer files again, from somebody whom you trust",
            note=first_line(error),
        ).rejection() from error


def _with_panics_as_diagnostics(tokenizer: Any, label: str) -> Any:
    """Wrap a tokenizer so that it raises Reject where the library panics."""
    kind = type(tokenizer)
    if not tokenizer.is_fast:
        return tokenizer

    def watched(name: str) -> Callable[..., Any]:
        inner = getattr(kind, name)

        @wraps(inner)
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            with tokenizer_panics_as_diagnostics(label):
                return inner(self, *arguments, **named)

        return call

    def reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _tokenizer_from_state, (kind, self.__dict__)  # pickle looks a class up by its name

    members = {name: watched(name) for name in _CALLS} | {"__reduce_ex__": reduced, "__module__": kind.__module__}
    tokenizer.__class__ = type(kind.__name__, (kind,), members)
    return tokenizer


def _tokenizer_from_state(tokenizer_class: "type[PreTrainedTokenizerBase]", state: dict[str, Any]) -> Any:
    tokenizer = tokenizer_class.__new__(tokenizer_class)
    tokenizer.__dict__.update(state)
    return tokenizer


_ELSEWHERE = ("gguf_file", "fast_tokenizer_files", "tokenizer_object", "init_inputs")


def _checked_file_fields_of_config(folder: Path, label: str) -> tuple[str, ...]:
    """Names of the config's fields that are files, which transformers is to take from the folder alone.

    Reject (bad-tokenizer) where a tokenizer names a class that is none, or has a field by which transformers reads
    something else than the files of a tokenizer.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return ()
    try:
        body = read_json(path, CONFIG)
    except (OSError, ValueError, RecursionError) as error:
        raise invalid_tokenizer(f"{label}: {path} can't be read as JSON", help="fetch it again").rejection() from error
    if not isinstance(body, dict):
        raise invalid_tokenizer(f"{label}: {path} is no JSON object", help="fetch it again").rejection()
    max_length = body.get("model_max_length")
    if max_length is not None and type(max_length) not in (int, float):
        raise invalid_tokenizer(
            f"{label}: {path} has a `model_max_length` that is no number", help="fetch it again"
        ).rejection()
    name = body.get("tokenizer_class")
    if name is not None and not is_known_tokenizer_class(name):
        raise invalid_tokenizer(
            f"{label}: {path} names `{str(name)[:80]}`, which is no tokenizer of transformers",
            help="fetch the tokenizer files again",
        ).rejection()
    other = next((name for name in _ELSEWHERE if body.get(name)), None)
    if other is not None:
        raise invalid_tokenizer(
            f"{label}: {path} has a `{other}`, which leads to other files than a tokenizer's",
            help="fetch the tokenizer files again, from somebody whom you trust",
        ).rejection()
    return tuple(name for name in body if name.endswith("_file"))
