"""A tokenizer's chat template, rendered within bounds: it came with the model, from anybody.

transformers runs templates in Jinja's sandbox, which keeps them from Python, but not from taking all time and memory.
Here a template takes so many lines, its texts are so long, and it has none of the operations by which one line makes
a text of any length.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from jinja2 import Environment, TemplateError, nodes

LINES, TEXT, TEMPLATE = 500_000, 32 << 20, 1 << 20  # lines run, characters of a text, of a template
_WIDE = re.compile(r"[%:<>^=.*]\d{5,}")  # a width in a format, "%99999d"


class TooLong(TemplateError):
    """A template that takes more than any conversation needs."""


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
    """The text of a conversation. Raises TemplateError, TypeError or ValueError where the template refuses it."""
    template = tokenizer.chat_template
    for text in template.values() if isinstance(template, Mapping) else [template]:
        _check(str(text))
    with _bounded():
        return tokenizer.apply_chat_template(messages, tokenize=False, **more)


@cache
def _check(text: str) -> None:
    if len(text) > TEMPLATE:
        raise TooLong(f"it has {len(text)} characters")
    for node in (
        Environment(extensions=["jinja2.ext.loopcontrols"])
        .parse(_plain(text))
        .find_all((nodes.Pow, nodes.Mul, nodes.Mod, nodes.Const, nodes.Filter))
    ):
        text_first = isinstance(node, (nodes.Mul, nodes.Mod)) and any(
            isinstance(side, nodes.Const) and isinstance(side.value, str) for side in (node.left, node.right)
        )
        wide = isinstance(node, nodes.Const) and isinstance(node.value, str) and _WIDE.search(node.value)
        padded = isinstance(node, nodes.Filter) and node.name in ("center", "wordwrap")
        if isinstance(node, nodes.Pow) or text_first or wide or padded:
            raise TooLong("it has an operation that makes texts of any length")


def _plain(text: str) -> str:
    """Without the tags that transformers adds to Jinja's."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)


@contextmanager
def _bounded() -> Iterator[None]:
    """Count the lines that templates run in this thread, and look at what they have made."""
    taken = 0

    def line(frame: Any, event: str, _: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken > LINES:
            raise TooLong(f"it runs more than {LINES} lines")
        if any(isinstance(held, (str, list, tuple)) and len(held) > TEXT for held in frame.f_locals.values()):
            raise TooLong(f"it makes a text of more than {TEXT} characters")
        return line

    def call(frame: Any, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
