"""Selectors: globs over module paths, joined left to right by `|`, `-` and `&`.

A glob matches a path or any end of it that starts at a component: `layers.*.mlp` matches `model.layers.3.mlp`.
`*` stands for any characters of one component, `**` for any number of components, none included, `{q,v}` for
one of several, `{0..3}` for a number of a range. There are no regular expressions: a selector that is wrong
should match nothing, and be told so.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from .values import Selector

MAX_LENGTH = 512  # combinations of one glob's braces


@dataclass(frozen=True)
class UnmatchedPart:
    """A part of a selector that matches nothing: the whole glob, or one alternative of its braces.

    `term` counts the globs of the selector from 0, `text` is the part, `start` its offset in the glob;
    `subtracts` where the glob matches paths, but none that it could take away (`-`) or leave (`&`).
    """

    term: int
    glob: str
    text: str
    start: int
    subtracts: bool = False


@dataclass(frozen=True)
class BraceAlternatives:
    """A braced part of a glob with the offset of each alternative."""

    options: tuple[str, ...]
    starts: tuple[int, ...]


class InvalidGlob(ValueError):
    """A glob that can't be read: what is so, and where."""

    def __init__(self, message: str, start: int, end: int):
        super().__init__(message)
        self.message, self.start, self.end = message, start, end


_TOKEN = re.compile(r"\{([^{}]*)\}|([A-Za-z0-9_.*-]+)")
_COUNT = re.compile(r"(\d+)\.\.(\d+)\Z")


@lru_cache(maxsize=1024)
def parse_glob(glob: str) -> tuple[str | BraceAlternatives, ...]:
    """The parts of a glob in order; raises BadGlob."""
    parts: list[str | BraceAlternatives] = []
    at = 0
    while at < len(glob):
        match = _TOKEN.match(glob, at)
        if match is None:
            raise InvalidGlob(_glob_error_at(glob, at), at, at + 1)
        parts.append(match[2] if match[1] is None else _parse_braces(match[1], at + 1))
        at = match.end()
    if not parts:
        raise InvalidGlob("the selector is empty", 0, 0)
    if any(a == "" for a in re.sub(r"\{[^{}]*\}", "x", glob).split(".")):
        raise InvalidGlob("a dot of the selector has no name beside it", 0, len(glob))
    if expansion_count(parts) > MAX_LENGTH:
        raise InvalidGlob(f"the braces make {expansion_count(parts)} globs, the limit is {MAX_LENGTH}", 0, len(glob))
    return tuple(parts)


def _glob_error_at(glob: str, offset: int) -> str:
    """Why no part of a glob begins at a character of it."""
    if glob[offset] == "{":
        return "braces lie within braces" if "}" in glob[offset:] else "`{` is not closed"
    return "`}` closes nothing" if glob[offset] == "}" else f"`{glob[offset]}` has no meaning in a selector"


def expansion_count(parts: Iterable[str | BraceAlternatives]) -> int:
    count = 1
    for part in parts:
        count *= len(part.options) if isinstance(part, BraceAlternatives) else 1
    return count


def _parse_braces(body: str, start: int) -> BraceAlternatives:
    if match := _COUNT.match(body):
        low, high = int(match[1]), int(match[2])
        if low > high or high - low >= MAX_LENGTH:
            raise InvalidGlob(f"`{body}` counts from {low} to {high}", start, start + len(body))
        return BraceAlternatives(tuple(str(i) for i in range(low, high + 1)), (start,) * (high - low + 1))
    options, starts, at = body.split(","), [], start
    for option in options:
        starts.append(at + len(option) - len(option.lstrip()))
        if not re.fullmatch(r"[A-Za-z0-9_.*-]*", option.strip()):
            raise InvalidGlob(f"`{option.strip()}` has no meaning in a selector", at, at + len(option))
        at += len(option) + 1
    return BraceAlternatives(tuple(o.strip() for o in options), tuple(starts))


@lru_cache(maxsize=4096)
def _glob_components(brace_free_glob: str) -> tuple[str, ...]:
    """Components of a glob without braces; one that may stand for none begins it, as an end of a path is enough."""
    return ("**", *(c if c == "**" else re.sub(r"\*+", "*", c) for c in brace_free_glob.split(".")))


def _matches_brace_free_glob(glob: str, path: str) -> bool:
    """Whether a glob without braces matches a path or an end of it.

    A table of the components that may come next, for each name of the path: `re` would try `**` in all ways.
    """
    components, names = _glob_components(glob), path.split(".")
    if components[-1] != "**" and not _matches_component(components[-1], names[-1]):
        return False
    reached = _with_positions_past_double_star({0}, components)
    for name in names:
        stays = {at for at in reached if at < len(components) and components[at] == "**"}
        moves = {at + 1 for at in reached - stays if at < len(components) and _matches_component(components[at], name)}
        reached = _with_positions_past_double_star(stays | moves, components)
    return len(components) in reached


def _with_positions_past_double_star(positions: set[int], components: tuple[str, ...]) -> set[int]:
    """Add the positions behind a `**` that stands for no name."""
    for at in sorted(positions):
        while at < len(components) and components[at] == "**":
            at += 1
            positions.add(at)
    return positions


def _matches_component(component: str, name: str) -> bool:
    """Whether a name fits a component: `*` is any part of it."""
    first, *pieces = component.split("*")
    if not pieces:
        return first == name
    at, end = len(first), len(name) - len(pieces[-1])
    if not name.startswith(first) or not name.endswith(pieces[-1]) or at > end:
        return False
    for piece in pieces[:-1]:
        index = name.find(piece, at, end)
        if index < 0:
            return False
        at = index + len(piece)
    return True


def glob_matches_path(glob: str, path: str) -> bool:
    """Whether a glob, braces included, matches a path or an end of it."""
    options = [p.options if isinstance(p, BraceAlternatives) else (p,) for p in parse_glob(glob)]
    return any(_matches_brace_free_glob("".join(pick), path) for pick in product(*options))


@lru_cache(maxsize=1024)
def _expand_braces(glob: str) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Every combination of a glob's alternatives: (index into each brace, plain glob)."""
    parts = parse_glob(glob)
    ranges = [range(len(p.options)) for p in parts if isinstance(p, BraceAlternatives)]
    expanded = []
    for pick in product(*ranges):
        picks = iter(pick)
        expanded.append(
            (pick, "".join(p.options[next(picks)] if isinstance(p, BraceAlternatives) else p for p in parts))
        )
    return tuple(expanded)


def _matched_paths_and_alternatives(glob: str, paths: Sequence[str]) -> tuple[set[str], set[tuple[int, int]]]:
    """Paths that a glob matches, and the (brace, alternative) pairs that had a part in it."""
    matched: set[str] = set()
    alive: set[tuple[int, int]] = set()
    for pick, plain in _expand_braces(glob):
        hits = [p for p in paths if _matches_brace_free_glob(plain, p)]
        if hits:
            matched.update(hits)
            alive.update(enumerate(pick))
    return matched, alive


def resolve_selector(selector: Selector, paths: Iterable[str]) -> tuple[str, ...]:
    """The paths that a selector matches, in the order of `paths`, each once."""
    paths = tuple(dict.fromkeys(paths))
    chosen: set[str] = set()
    for op, glob in selector.terms:
        chosen = _combine_sets(op, chosen, _matched_paths_and_alternatives(glob, paths)[0])
    return tuple(p for p in paths if p in chosen)


def _combine_sets(op: str, left: set[str], right: set[str]) -> set[str]:
    if op == "|":
        return left | right
    return left - right if op == "-" else left & right


def unmatched_parts(selector: Selector, paths: Iterable[str]) -> tuple[UnmatchedPart, ...]:
    """Parts of a selector that match nothing: an error without `allow empty`."""
    paths = tuple(dict.fromkeys(paths))
    chosen: set[str] = set()
    out: list[UnmatchedPart] = []
    for term, (op, glob) in enumerate(selector.terms):
        matched, alive = _matched_paths_and_alternatives(glob, paths)
        if not matched:
            out.append(UnmatchedPart(term, glob, glob, 0))
        else:
            braces = [p for p in parse_glob(glob) if isinstance(p, BraceAlternatives)]
            out += [
                UnmatchedPart(term, glob, option, brace.starts[j])
                for i, brace in enumerate(braces)
                for j, option in enumerate(brace.options)
                if (i, j) not in alive
            ]
            if op != "|" and chosen and not matched & chosen:
                out.append(UnmatchedPart(term, glob, glob, 0, subtracts=True))
        chosen = _combine_sets(op, chosen, matched)
    return tuple(out)
