"""Reads the manual's pages: recipes in fenced blocks, the marks of their lines, the output shown after."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "dsl" / "suites"
_FENCE = re.compile(r"^```(\w*)[ ]?(.*?)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"#\s*(error|warning|note): ([a-z0-9-]+(?:, [a-z0-9-]+)*)")


@dataclass
class Case:
    """A recipe of a page. `marks` are (line, slug), line 0 for what lies outside of the recipe.

    Behind ```effspec may stand `--set name=value`, `error SLUG` for a fault outside of the recipe, or
    `module PATH`: then the block is a file that later recipes of the section use, and no recipe itself.
    """

    page: str
    line: int
    title: str
    text: str
    sets: list[str] = field(default_factory=list)
    marks: set[tuple[int, str]] = field(default_factory=set)
    modules: dict[str, str] = field(default_factory=dict)
    output: tuple[int, int] | None = None  # where the shown output lies in the page
    shown: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.title}"


def pages() -> list[Path]:
    return sorted(FOLDER.glob("*.md"))


def cases(page: Path) -> list[Case]:
    text = page.read_text(encoding="utf-8")
    out: list[Case] = []
    title, modules = "", {}
    for fence in _FENCE.finditer(text):
        language, info, body = fence.groups()
        heading = re.findall(r"^## (.+)$", text[: fence.start()], re.MULTILINE)[-1:] or [""]
        if heading[0] != title:
            title, modules = heading[0], {}
        words = shlex.split(info)
        pairs = list(zip(words[::2], words[1::2], strict=False))
        if language == "text" and out and "effspec" in _before(text, fence.start()):
            out[-1].output, out[-1].shown = fence.span(3), body
        elif language == "effspec" and ("module", named := dict(pairs).get("module")) in pairs:
            modules = {**modules, named: body}
        elif language == "effspec":
            marks = {
                (i, slug)
                for i, line in enumerate(body.splitlines(), 1)
                for found in _MARK.finditer(line)
                for slug in found[2].split(", ")
            }
            marks |= {(0, slug) for kind, slug in pairs if kind == "error"}
            sets = [value for flag, value in pairs if flag == "--set"]
            out.append(Case(page.stem, text.count("\n", 0, fence.start()) + 1, title, body, sets, marks, modules))
    return out


def _before(text: str, end: int) -> str:
    """The language of the fence before an offset, "" where a heading lies between."""
    opening = list(_FENCE.finditer(text[:end]))
    if not opening or "\n#" in text[opening[-1].end() : end]:
        return ""
    return opening[-1][1]
