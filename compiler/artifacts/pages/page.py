"""The page: sections of what the artifacts of one pipeline say, in one HTML file that loads nothing."""

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....dsl.syntax.render import printable
from ...core.quantity import counted, size
from ..load import facts as header_of
from ..manifest import Expectation
from .accounts import accounts
from .chart import check_packages
from .layers import layers
from .listing import listing
from .origin import Row, facts, files, hashes, measures, reopened, spent
from .points import points
from .sheet import Sheet, word
from .steps import steps
from .timings import timings
from .ways import ways

HERE = Path(__file__).parent
OUTCOMES = {"holds": "✓", "fails": "✕", "undecided": "?", "skipped": "–"}
TILES = 4
NAMES = {  # of common measures, for those who don't know a recipe's words
    "params": "parameters",
    "bytes": "bytes of weights",
    "flops": "operations per token",
    "decode.p50": "time per token",
    "prefill.p50": "time to read a prompt",
}
SECTIONS = {  # anchor -> (name, what there has to be for it)
    "measured": ("Measured", ""),
    "accounts": ("Forms", "accounts"),
    "front": ("The front", "points"),
    "ways": ("Ways to answer", "ways"),
    "layers": ("Layers", "layers"),
    "steps": ("Decisions", "steps"),
    "speed": ("Speed", "timings"),
    "recipe": ("Recipe", "lines"),
    "origin": ("Origin", ""),
}


def page(sheets: Sequence[Sheet]) -> str:
    """One page of what was compiled from one recipe: the first sheet speaks for the model, each for its files."""
    check_packages()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(HERE)
    inside = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    inside.filters |= {"drawn": Markup, "coded": _coded, "minus": _minus}
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    whole = inside.get_template("page.html").render(
        style=style,
        script=script,
        policy=_policy(style, script),
        icons=OUTCOMES,
        names=NAMES,
        percent=lambda share: f"{100 * share:.2f}",
        **_content(list(sheets)),
    )
    return printable(whole)  # signs that turn the order of letters could show another recipe than there is


def _policy(style: str, script: str) -> str:
    """Nothing is loaded from anywhere, and only this style and this script are used."""
    sources = " ".join(f"{kind}-src '{_hashed(text)}';" for kind, text in (("style", style), ("script", script)))
    return f"default-src 'none'; {sources} base-uri 'none'; form-action 'none'"


def _hashed(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _minus(text: str) -> str:
    """Hyphens before numbers as minus signs."""
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def _coded(text: str) -> str:
    """What stands between backticks as code."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _content(sheets: list[Sheet]) -> dict[str, Any]:
    first = sheets[0].manifest
    rows = measures(sheets[0])
    expectations = tuple(dict.fromkeys(e for s in sheets for e in s.manifest.expectations))
    found = {
        "title": word(first.name) or word(first.recipe.get("name")) or "model",
        "about": _about(first.recipe.get("text", "")),
        "origin": next((word(label) for label in first.lock.get("inputs", {}) if not label.startswith("data ")), ""),
        "targets": [(s.place, s.manifest.kind, size(s.manifest.bytes) if s.manifest.files else "") for s in sheets],
        "verdict_of": _verdict(expectations),
        "tiles": _tiles(rows, first.members),
        "tables": _tables(sheets),
        "accounts": accounts(sheets),
        "where": next((a.where for s in sheets for a in s.manifest.accounts), ""),
        "points": points(first),
        "ways": [drawn for s in sheets if (drawn := ways(s.calibration))],
        "layers": layers(first),
        "steps": steps(first),
        "timings": [t for s in sheets for t in timings(s.manifest)],
        "lines": listing(sheets),
        "facts": facts(sheets[0]),
        "hashes": list(dict.fromkeys(h for s in sheets for h in hashes(s))),
        "files": [(s.place, files(s)) for s in sheets if s.manifest.files],
        "spent": spent(sheets[0]),
        "reopened": [(s.place, reopened(s.manifest.checks)) for s in sheets if s.manifest.checks],
        "opening": [(s.place, _opening(s)) for s in sheets if _opening(s)],
    }
    return found | {"sections": [(anchor, name) for anchor, (name, key) in SECTIONS.items() if not key or found[key]]}


def _tables(sheets: list[Sheet]) -> list[tuple[str, list[Row]]]:
    """Measures of each artifact, those of the first alone where others say the same."""
    found: list[tuple[str, list[Row]]] = []
    for sheet in sheets:
        rows = measures(sheet)
        if rows and rows not in [known for _, known in found]:
            found.append((sheet.place, rows))
    return found


def _about(text: str) -> str:
    """What the recipe says of itself."""
    found = re.search(r'^"""(.*?)"""', text, re.S | re.M)
    return word(found[1], 400) if found else ""


@dataclass(frozen=True)
class Verdict:
    outcome: str
    says: str


def _verdict(expectations: Sequence[Expectation]) -> Verdict | None:
    """The worst outcome, and how many there are of it."""
    if not expectations:
        return None
    said = [e.outcome for e in expectations]
    if set(said) == {"holds"}:
        all_ = {1: "The expectation holds", 2: "Both expectations hold"}
        return Verdict("holds", all_.get(len(said), f"All {len(said)} expectations hold"))
    worst = next(o for o in ("fails", "undecided", "skipped", said[0]) if o in said)
    verbs = {
        "fails": ("fails", "fail"),
        "undecided": ("is undecided", "are undecided"),
        "skipped": ("was skipped", "were skipped"),
    }
    one, many = verbs.get(worst, (word(worst), word(worst)))
    number = said.count(worst)
    return Verdict(worst, f"{number} of {counted(len(said), 'expectation')} {one if number == 1 else many}")


def _tiles(rows: list[Row], members: Sequence[Any]) -> list[Row]:
    """The measures that say most: size, what bounds are on, speed."""
    if members:
        return []
    ranked = sorted(rows, key=lambda row: (not row.change, row.metric == "bytes", not row.bounds))
    chosen = ranked[:TILES]
    return [row for row in rows if row in chosen and row.change]


def _opening(sheet: Sheet) -> list[str]:
    """How it is opened, and what its target wants known."""
    folders = {name.split("/")[0] for name in sheet.manifest.files}
    said = header_of(sheet.manifest.kind)
    found = [text for folder, text in said.get("loads", {}).items() if folder in folders]
    use = said.get("use", "")
    return [*found, *([use[0].upper() + use[1:] + "."] if use else []), *(word(n, 600) for n in sheet.manifest.notes)]
