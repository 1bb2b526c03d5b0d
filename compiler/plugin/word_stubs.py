"""Types of the words of recipes for editors: `python -m effc.compiler.plugin.word_stubs` writes `words.pyi`."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

from ...dsl.checker.vocabulary import Word
from ..core.cache import write_atomic
from .registry import Plugins
from .word_functions import KINDS, registry, signature, word_function

FILE = Path(__file__).with_name("words.pyi")
HEAD = '''"""Words of recipes, from their headers: `python -m effc.compiler.plugin.word_stubs` writes this file."""

from collections.abc import Sequence
from typing import Literal

from ...dsl.syntax.builder import Value
'''


def stub_text() -> str:
    """Text of `words.pyi`: a class for each namespace of the words of effc, without those of other packages."""
    passes = _shipped_words("pass")
    namespaces = {name: _shipped_words(kind) for name, kind in KINDS.items()}
    namespaces |= {family: _words_of_family(passes, family) for family in _family_names(passes)}
    return "\n".join([HEAD, *(line for name in sorted(namespaces) for line in _class_lines(name, namespaces[name]))])


def _shipped_words(kind: str) -> dict[str, Word]:
    words = registry().vocabulary.words(kind)
    assert isinstance(words, Plugins)
    return {name: words[name] for name in words if words.modules[name].startswith("effc.")}


def _family_names(words: dict[str, Word]) -> list[str]:
    return sorted({name.partition(".")[0] for name in words if "." in name})


def _words_of_family(words: dict[str, Word], family: str) -> dict[str, Word]:
    return {name.removeprefix(f"{family}."): word for name, word in words.items() if name.startswith(f"{family}.")}


def _class_lines(name: str, words: dict[str, Word], margin: str = "") -> Iterator[str]:
    yield f"{margin}class {name}:"
    inner = f"{margin}    "
    for family in _family_names(words):
        yield from _class_lines(family, _words_of_family(words, family), inner)
    for path in sorted(name for name in words if "." not in name):
        doc = indent(word_function(words[path]).__doc__ or "", f"{inner}    ").strip().replace("\\", "\\\\")
        yield f"{inner}@staticmethod"
        yield f"{inner}def {path}{signature(words[path])}:"
        yield f'{inner}    """{doc}\n{inner}    """'
    yield ""


if __name__ == "__main__":
    write_atomic(FILE, stub_text().encode())
