"""How the parts of a step's key differ from those of a result that is kept, as a person would say it."""

from collections.abc import Mapping
from typing import Any

from ...dsl.checker.value_text import plain
from ...dsl.checker.values import from_json
from .safe_read import MISFIT
from .sealed_json import canonical

_WHOLE = {
    "input": "it works on another result than the one that is kept",
    "format": "results are kept in another form now",
}
_NAMED = {  # parts that hold hashes, by the names inside of them
    "data": "the rows of `{}` are others",
    "files": "the file of `{}` is another",
    "source": "the code of the {} has changed",
}


def difference(part: str, then: Any, now: Any) -> str:
    """The first thing in which a part differs: "`keep` was 50% and is 75%"."""
    if part in _WHOLE:
        return _WHOLE[part]
    if part == "step":
        part, then, now = "", then["args"], now["args"]
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        name = next(k for k in (*now, *then) if k not in now or k not in then or now[k] != then[k])
        if part in _NAMED:
            return _NAMED[part].format(name)
        return f"`{name}` was {_word(then.get(name))} and is {_word(now.get(name))}"
    return f"the {part} was {_word(then)} and is {_word(now)}"


def _word(value: Any) -> str:
    """A value as a recipe writes it, or as JSON; the middle of a long one is left out."""
    try:
        text = plain(from_json(value)) if not isinstance(value, str) else value
    except MISFIT:
        text = canonical(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
