"""Rules for the arguments of a plug-in together: methods of its class, whose attributes are the arguments.

A plug-in overrides those of `Rules` that it has something to say to. They are run from its header, without the rest of
its file (compiler/plugin/header.py), so they use literals, builtins and the names that headers may use.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Conflict:
    """Arguments that can't go together.

    params         parameters that it is about; reported at the first that the recipe gives
    message, help  sentence and remedy
    """

    params: tuple[str, ...]
    message: str
    help: str


@dataclass(frozen=True)
class Unread:
    """Parameters that nothing reads: a problem where the recipe gives one.

    params   such parameters
    home     arguments that they belong to, as a sentence shows them: "`strategy: abm`"
    deciding parameters that decide it
    """

    params: tuple[str, ...]
    home: str
    deciding: tuple[str, ...]


@dataclass(frozen=True)
class MissingStep:
    """A pass that must have run before: a problem where no earlier step is of it.

    params   parameters that ask for it, none where every call does
    """

    step: str
    reason: str
    params: tuple[str, ...] = ()


Problem = Conflict | Unread | MissingStep


class Rules:
    """Answers that depend on arguments; the defaults are of plug-ins that override none."""

    def problems(self) -> Iterator[Problem]:
        """Problems of the arguments together, with literal parameters and sentences, as `effc explain` shows them."""
        yield from ()

    def effects(self) -> Iterator[str]:
        """Properties of the result that some targets can't hold, such as "uneven widths" or "packed weights"."""
        yield from ()

    def cannot_hold(self) -> Mapping[str, str]:
        """Effects of earlier passes that a target refuses, each with a reason."""
        return {}

    def min_row_tokens(self) -> int:
        """Tokens of text that each row of a metric's `data` must have, without padding; 0 where any rows will do."""
        return 0

    def min_rows(self) -> int:
        """Rows that a target's `data` must have together."""
        return 0

    def cannot_measure(self) -> Mapping[str, str]:
        """Effects of earlier passes that a metric's value leaves out, each with a reason."""
        return {}

    def result_kind(self) -> str:
        """Kind of the result of a pass: "model", "adapters", "front" or "family"."""
        return "model"
