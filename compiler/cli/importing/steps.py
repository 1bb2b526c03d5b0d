"""Steps of an imported recipe, and remarks where effc has no equivalent."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

DATA = "text.calib"


@dataclass
class Imported:
    """A pipeline in the making.

    model    as a person would write it to `effc new`; "" where the file names none
    steps    (name, call as text, remarks that stand above it)
    emits    calls of targets
    remarks  what stands above the pipeline
    """

    tool: str
    model: str = ""
    steps: list[tuple[str, str, list[str]]] = field(default_factory=list)
    emits: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, name: str, word: str, args: Mapping[str, str], remarks: list[str] | None = None) -> None:
        """Add a step; arguments are texts of the language."""
        called = ", ".join(f"{key}: {value}" for key, value in args.items() if value)
        same_names = sum(n.rstrip("0123456789") == name for n, _, _ in self.steps)
        self.steps.append((f"{name}{same_names + 1}" if same_names else name, f"{word}({called})", remarks or []))

    def remark(self, text: str) -> None:
        self.remarks.append(one_line(text))


def one_line(text: Any) -> str:
    """A foreign text that may stand in a comment: one line, printable, short."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "?" for c in line)[:160]


def percent_or_empty(share: Any) -> str:
    """`50%` of 0.5; "" of what is no share between 0 and 1."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        return ""
    return f"{round(100 * share, 6):g}%"


def integer_text_or_empty(value: Any, low: int, high: int) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high else ""


def number_text_or_empty(value: Any, low: float, high: float) -> str:
    """A number of the language: digits and a dot."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        return ""
    return f"{float(value):.10f}".rstrip("0").rstrip(".")


def selector_and_remarks(targets: Any, ignore: Any) -> tuple[str, list[str]]:
    """`on:` for lists of names and `re:` patterns; "" for all linear modules. And what could not be said."""
    globs, left = _globs_and_rest(targets)
    without, unsaid = _globs_and_rest(ignore)
    without = [g for g in without if "lm_head" not in g]  # outside the layers anyway
    remarks = [f"targets `{one_line(t)}` are no glob: all linear modules are taken" for t in left]
    remarks += [f"`{one_line(t)}`, which was to be ignored, is no glob: it is not" for t in unsaid]
    if not globs and not without:
        return "", remarks
    on = " | ".join(f'"{g}"' for g in globs) or '"layers.**"'
    return (f"({on})" if len(globs) > 1 and without else on) + "".join(f' - "{g}"' for g in without), remarks


def _globs_and_rest(items: Any) -> tuple[list[str], list[str]]:
    """(globs, what is none) of a name, a list of names and patterns, or None."""
    listed = [] if items is None else items if isinstance(items, list) else [items]
    globs: list[str] = []
    left: list[str] = []
    for item in listed:
        if item in ("Linear", "__ALL__", "__ALL_PRUNABLE__"):
            continue
        glob = _regex_to_glob(str(item))
        (globs if glob else left).append(glob or str(item))
    return globs, left


def _regex_to_glob(text: str) -> str:
    """`**.*mlp*.**` of `re:.*mlp.*`; "" of a pattern that says more than globs do."""
    if not text.startswith("re:"):
        return text if re.fullmatch(r"[\w.]+", text) else ""
    parts = text.removeprefix("re:").removeprefix("^").removesuffix("$").split(".*")
    if not all(re.fullmatch(r"(\w|\\\.|\d)*", part) for part in parts):
        return ""
    parts = [part.replace("\\.", ".") for part in parts]
    glob = parts[0]
    for left, right in pairwise(
        parts
    ):  # `.*` runs over dots, `*` doesn't: it is the rest of one name, names, part of one
        inner = "" if left.endswith(".") or not left else "*."
        glob += f"{inner}**" + ("" if right.startswith(".") or not right else ".*") + right
    return glob
