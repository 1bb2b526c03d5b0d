"""Vocabulary of the language: passes, targets, metrics, data and models with their parameters.

The compiler fills a `Vocabulary` from the headers of its files; the language never sees a class.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .rules import Problem, Rules


class Required:
    """The default of a parameter that must be given."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


@dataclass(frozen=True)
class Param:
    """One parameter of a word.

    types    "int", "ratio", "choice"... as compiler/plugin/header.py names them, or "list[T]" of one; the first is the
             one that help mentions
    of       legal bases of a ratio ("channels", "params", ...), a ratio without `of` takes the only one; or the
             names that shares are divided among
    unit     what a plain int counts ("blocks", "channels", "steps", "ms"), for pages and messages
    among    the numbers that it may be; multiple: of what, 0 where it does not matter; parity: "odd" or any
    least    items of a list, at least; distinct: none twice; falling: each smaller than the one before
    starts_full   a list of shares falls from 100%
    """

    name: str
    types: tuple[str, ...]
    doc: str
    default: Any = REQUIRED
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    unit: str = ""
    among: tuple[int, ...] = ()
    multiple: int = 0
    parity: str = ""
    least: int = 0
    distinct: bool = False
    falling: bool = False
    starts_full: bool = False
    spelled: str = ""  # what a text looks like, as a regular expression over all of it
    rows_kind: str = ""  # kind of the rows that a data set must have, its `rows_kind`; any where it is ""
    lines: bool = False  # a text that may hold tabs and line ends; others are names and paths
    positional: bool = False  # may be given without its name, in order of declaration

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


def _without_rules(**arguments: Any) -> Rules:
    return Rules()


@dataclass(frozen=True)
class Word:
    """A name that a recipe may call: what its file's header says.

    problems   all that its rules can report, for pages
    declare    keyword arguments -> rules for them
    """

    kind: str
    name: str
    doc: str  # the whole docstring: sentence, paragraph, Source, Example, Result
    params: tuple[Param, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # the header's other literals: keeps, acts_on, after ...
    path: str = ""
    problems: tuple[Problem, ...] = ()
    declare: Callable[..., Rules] = _without_rules

    @property
    def summary(self) -> str:
        return self.doc.strip().split("\n\n")[0].replace("\n", " ")

    def rules(self, arguments: Mapping[str, Any]) -> Rules:
        """Rules for arguments; others have their defaults, None where a parameter has none."""
        return self.declare(**{p.name: None if p.required else p.default for p in self.params} | dict(arguments))

    def param(self, name: str) -> Param | None:
        return next((p for p in self.params if p.name == name), None)


@dataclass(frozen=True)
class Vocabulary:
    """All words by kind and name, e.g. `vocabulary.words("pass")["prune.blocks"]`."""

    by_kind: Mapping[str, Mapping[str, Word]]

    def words(self, kind: str) -> Mapping[str, Word]:
        return self.by_kind.get(kind, {})

    def word(self, kind: str, name: str) -> Word | None:
        return self.words(kind).get(name)
