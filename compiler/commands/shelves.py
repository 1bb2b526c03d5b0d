"""`effc passes` and `effc recipes`: what there is to use."""

from typing import TYPE_CHECKING, Annotated

import typer

from ...dsl.diagnostics import Fault, Reject
from .flags import Shared, verb

if TYPE_CHECKING:
    from ...dsl.vocabulary import Word
    from ..words.library import Shipped

unknown_recipe = Fault("unknown-recipe", "The recipe library has no file of that name.", exit="usage")

TITLES = {"pass": "passes", "target": "targets", "metric": "metrics", "data": "data", "model": "models"}

_name = typer.Argument(metavar="[NAME]", help="A recipe or module to print.", show_default=False)
_all = typer.Option("--all", help="Targets, metrics, data and models, too.", show_default=False)


def register(app: typer.Typer) -> None:
    @verb(app)
    def passes(shared: Shared, every: Annotated[bool, _all] = False) -> None:
        """List the passes, each with its sentence; `effc explain` has pages."""
        from ..words.shelf import Shelf

        vocabulary = Shelf().vocabulary
        found = {
            kind: [vocabulary.words(kind)[n] for n in vocabulary.words(kind)]
            for kind in (TITLES if every else ("pass",))
        }
        if shared.format == "json":
            body = {TITLES[kind]: [_json(w) for w in words] for kind, words in found.items()}
            shared.screen.answer_json("passes", **body)
        else:
            shared.screen.answer(_drawn(found, shared, every))

    @verb(app)
    def recipes(shared: Shared, name: Annotated[str | None, _name] = None) -> None:
        """List the recipes and modules that come with effc, or print one."""
        from ..words.library import shipped

        known = shipped()
        if name is not None:
            return _print_recipe(name, known, shared)
        rows = [{"name": r.name, "path": str(r.path), "doc": r.sentence} for r in known.values()]
        if shared.format == "json":
            return shared.screen.answer_json("recipes", recipes=rows)
        blocks = [
            f"{shared.screen.styled(r['name'], 'bold')}\n  {r['doc']}\n  {shared.screen.styled(r['path'], 'dim')}"
            for r in rows
        ]
        return shared.screen.answer("\n\n".join(blocks))


def _print_recipe(name: str, known: "dict[str, Shipped]", shared: Shared) -> None:
    from ...dsl.nearest import suggestion

    if name not in known:
        raise Reject(unknown_recipe(f"the library has no recipe `{name}`", help=suggestion(name, known, "it has")))
    text = known[name].file.source.text
    if shared.format == "json":
        return shared.screen.answer_json("recipes", name=name, path=str(known[name].path), text=text)
    return shared.screen.write(text)


def _drawn(found: "dict[str, list[Word]]", shared: Shared, titled: bool) -> str:
    width = max((len(w.name) for words in found.values() for w in words), default=0)
    blocks = []
    for kind, words in found.items():
        lines = [f"{shared.screen.styled(w.name.ljust(width), 'cyan')}  {w.summary}" for w in words]
        title = [shared.screen.styled(TITLES[kind], "bold")] if titled else []
        blocks.append("\n".join([*title, *(lines or ["none"])]))
    return "\n\n".join(blocks)


def _json(word: "Word") -> dict:
    return {
        "name": word.name,
        "summary": word.summary,
        "params": [{"name": p.name, "types": list(p.types), "doc": p.doc, "required": p.required} for p in word.params],
    }
