"""`effc passes` and `effc recipes`: what there is to use."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .flags import Shared, verb

if TYPE_CHECKING:
    from ...dsl.vocabulary import Word

TITLES = {"pass": "passes", "target": "targets", "metric": "metrics", "data": "data", "model": "models"}

_all = typer.Option("--all", help="Targets, metrics, data and models, too.", show_default=False)


def register(app: typer.Typer) -> None:
    @verb(app)
    def passes(shared: Shared, every: Annotated[bool, _all] = False) -> None:
        """List the passes, each with its sentence; `effc explain` has pages."""
        from ..shelf import Shelf

        vocabulary = Shelf().vocabulary
        found = {kind: [vocabulary.words(kind)[n] for n in vocabulary.words(kind)]
                 for kind in (TITLES if every else ("pass",))}
        if shared.format == "json":
            body = {TITLES[kind]: [_json(w) for w in words] for kind, words in found.items()}
            shared.screen.answer_json("passes", **body)
        else:
            shared.screen.answer(_drawn(found, shared, every))

    @verb(app)
    def recipes(shared: Shared) -> None:
        """List the recipes that come with effc."""
        rows = [{"name": name, "path": str(path), "doc": doc} for name, path, doc in library()]
        if shared.format == "json":
            return shared.screen.answer_json("recipes", recipes=rows)
        blocks = [f"{shared.screen.styled(r['name'], 'bold')}\n  {r['doc'] or 'has no docstring'}\n"
                  f"  {shared.screen.styled(r['path'], 'dim')}" for r in rows]
        return shared.screen.answer("\n\n".join(blocks))


def _drawn(found: "dict[str, list[Word]]", shared: Shared, titled: bool) -> str:
    width = max((len(w.name) for words in found.values() for w in words), default=0)
    blocks = []
    for kind, words in found.items():
        lines = [f"{shared.screen.styled(w.name.ljust(width), 'cyan')}  {w.summary}" for w in words]
        title = [shared.screen.styled(TITLES[kind], "bold")] if titled else []
        blocks.append("\n".join([*title, *(lines or ["none"])]))
    return "\n\n".join(blocks)


def _json(word: "Word") -> dict:
    return {"name": word.name, "summary": word.summary,
            "params": [{"name": p.name, "types": list(p.types), "doc": p.doc, "required": p.required}
                       for p in word.params]}


def library() -> list[tuple[str, Path, str]]:
    """Name, file and docstring of every shipped recipe."""
    from importlib.util import find_spec

    from ...dsl.parse import parse, read_source

    spec = find_spec("effc.recipes")
    folders = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    files = {f.relative_to(p).as_posix(): f for p in folders for f in sorted(p.rglob("*.effspec"))}
    found = []
    for name, file in sorted(files.items()):
        doc = parse(read_source(file)).file.doc
        found.append((name, file, " ".join(doc.value.split()) if doc else ""))
    return found
