"""Words of recipes as Python functions: `effc.prune.multi(remove="15% of params")` is a value of a recipe."""

import keyword
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, Signature
from itertools import zip_longest
from typing import Any

from ...dsl.checker.value_text import plain_value_text
from ...dsl.checker.vocabulary import REQUIRED, Param, Word
from ...dsl.syntax.builder import Value, call, literal
from .registry import Registry

KINDS = {"data": "data", "metrics": "metric", "models": "model", "targets": "target"}  # namespace -> kind of its words
SCORE = "score"  # parameter of passes that search
_PYTHON = {"int": "int", "float": "float", "bool": "bool", "shares": "dict[str, float]"}  # others are texts


@dataclass(frozen=True)
class Namespace:
    """Words of a kind below a dotted prefix, as attributes."""

    kind: str
    prefix: str = ""

    def __getattr__(self, name: str) -> Any:
        words, path = registry().vocabulary.words(self.kind), f"{self.prefix}{name}"
        if path in words:
            return word_function(words[path])
        if any(word.startswith(f"{path}.") for word in words):
            return Namespace(self.kind, f"{path}.")
        raise AttributeError(f"there is no {self.kind} `{path}`", name=name, obj=self)

    def __dir__(self) -> list[str]:
        words = registry().vocabulary.words(self.kind)
        return sorted({w.removeprefix(self.prefix).partition(".")[0] for w in words if w.startswith(self.prefix)})


@cache
def registry() -> Registry:
    return Registry()


def namespace_names() -> list[str]:
    """Namespaces of the package: families of passes, and the other kinds of words."""
    return sorted([*KINDS, *dir(Namespace("pass"))])


def namespace(name: str) -> Any:
    """A namespace of the package. Raises AttributeError."""
    return Namespace(KINDS[name]) if name in KINDS else getattr(Namespace("pass"), name)


def word_function(word: Word) -> Callable[..., Value]:
    """Function that makes a call of a word. Its arguments are compared with the header where a recipe is checked."""
    named_params = {p.name: p for p in word.params}
    positional = [p for p in word.params if p.positional]

    def make(*args: Any, **named: Any) -> Value:
        values = [_parse_if_literal(v, p) for v, p in zip_longest(args, positional[: len(args)])]
        names = {n.removesuffix("_"): v for n, v in named.items() if v is not None}
        return call(word.name, *values, **{n: _parse_if_literal(v, named_params.get(n)) for n, v in names.items()})

    make.__name__, make.__qualname__ = word.name.rpartition(".")[2], word.name
    make.__doc__ = "\n".join([word.summary, "", *(f"{p.name}: {p.doc}" for p in word.params)])
    make.__signature__ = signature(word)  # type: ignore[attr-defined]
    return make


def _parse_if_literal(value: Any, param: Param | None) -> Any:
    """A text as the literal that it is for a parameter; a string parameter's stays a string."""
    if isinstance(value, (list, tuple)):
        return [_parse_if_literal(item, param) for item in value]
    if not isinstance(value, str) or param is None:
        return value
    is_choice = value in param.choices
    is_text = bool({"string", "selector", "list[string]", "list[selector]"} & set(param.types))
    parsed = None if is_text and not is_choice else literal(plain_value_text(value) if is_choice else value)
    return value if parsed is None else parsed


class _Annotation(str):
    """Text that `inspect.Signature` shows without quotes."""

    __repr__ = str.__str__


def signature(word: Word) -> Signature:
    """Signature of a word's function. What `effc.optimize` fills in may be left out."""
    ordered = sorted(word.params, key=lambda p: (not p.positional, not p.required))
    parameters = [
        Parameter(
            p.name + "_" * keyword.iskeyword(p.name),
            Parameter.POSITIONAL_OR_KEYWORD if p.positional else Parameter.KEYWORD_ONLY,
            default=Parameter.empty if p.required and not is_filled_by_data(word, p) else _Annotation("..."),
            annotation=_Annotation(_python_type(p)),
        )
        for p in ordered
    ]
    return Signature(parameters, return_annotation=_Annotation("Value"))


def is_filled_by_data(word: Word, param: Param) -> bool:
    """Whether rows fill in a required parameter that is left out: data, and the score of a search."""
    score = word.kind == "pass" and param.name == SCORE and "metric" in param.types
    return param.default is REQUIRED and ("data" in param.types or score)


def _python_type(param: Param) -> str:
    types = []
    for kind in param.types:
        inner = kind.removeprefix("list[").removesuffix("]")
        text = f"Literal{list(param.choices)!r}" if inner == "choice" else _PYTHON.get(inner, "str")
        types.append(text if inner == kind else f"Sequence[{text}]")
    return " | ".join(dict.fromkeys([*types, "Value", *(["None"] if param.default is None else [])]))
