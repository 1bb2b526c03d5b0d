"""`effc passes` and `effc recipes`: what there is to use."""

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....dsl.syntax.diagnostics import Fault
from .flags import SharedFlags, make_verb
from .options import argument, option

if TYPE_CHECKING:
    from ....dsl.checker.vocabulary import Word
    from ...plugin.library_effects import Effects
    from ...plugin.recipe_library import LibraryFile

unknown_recipe = Fault("unknown-recipe", "The recipe library has no file of that name.", exit="usage")

recipe_there = Fault("recipe-there", "A recipe of that name is there already.", exit="usage")

TITLES = {"pass": "passes", "target": "targets", "metric": "metrics", "data": "data", "model": "models"}

ACTIONS = ("list", "search", "show", "copy")
_words = argument(
    "[list | search WORD... | show NAME | copy NAME]", "`show` may be left out; all are listed without anything."
)
_output = option("Where `copy` writes; here unless given.", "-o", "--output", metavar="FOLDER")
_all = option("Targets, metrics, data and models, too.", "--all")


def register(app: typer.Typer) -> None:
    @make_verb(app)
    def passes(shared: SharedFlags, all_words: Annotated[bool, _all] = False) -> None:
        """List the passes, each with its sentence; `effc explain` has pages."""
        from ...plugin.registry import Registry

        vocabulary = Registry().vocabulary
        by_kind = {
            kind: [vocabulary.words(kind)[n] for n in vocabulary.words(kind)]
            for kind in (TITLES if all_words else ("pass",))
        }
        if shared.format == "json":
            body: dict[str, Any] = {TITLES[kind]: [_plugin_json(w) for w in words] for kind, words in by_kind.items()}
            shared.screen.answer_json("passes", **body)
        else:
            shared.screen.answer(_plugin_table_text(by_kind, shared, all_words))

    @make_verb(app)
    def recipes(
        shared: SharedFlags,
        words: Annotated[list[str], _words] = (),  # type: ignore[assignment]
        output: Annotated[Path, _output] = Path(),
    ) -> None:
        """List, search, show or copy the recipes that come with effc; `effc compile NAME` compiles one."""
        from ...plugin.recipe_library import library_files

        known, (action, *operands) = library_files(), words or ["list"]
        if action not in ACTIONS:
            action, operands = "show", list(words)
        if (action in ("show", "copy") and len(operands) != 1) or (action == "search" and not operands):
            expected = "words" if action == "search" else "one name"
            raise typer.BadParameter(f"`effc recipes {action}` takes {expected}")
        if action == "show":
            return _print_recipe(operands[0], known, shared)
        if action == "copy":
            return _copy_recipe_with_files(_find_recipe(operands[0], known), output, shared)
        return _print_recipe_list(
            [r for r in known.values() if all(_mentions(r, word) for word in operands)], operands, shared
        )


def _print_recipe_list(matches: "list[LibraryFile]", search_terms: list[str], shared: SharedFlags) -> None:
    from ...plugin.library_effects import Effects

    if search_terms and not matches:
        raise unknown_recipe(f"no recipe says `{' '.join(search_terms)}`", help="`effc recipes` lists all").rejection()
    effects = Effects.read()
    if shared.format == "json":
        rows = [{"name": r.name, "path": str(r.path), "doc": r.sentence, **_effects_json(r, effects)} for r in matches]
        return shared.screen.answer_json("recipes", recipes=rows)
    screen = shared.screen
    blocks = []
    for recipe in matches:
        lines = [screen.styled(recipe.name.removesuffix(".effspec"), "bold"), f"  {recipe.sentence}"]
        blocks.append(
            "\n".join([*lines, *(f"  {screen.styled(line, 'dim')}" for line in _effect_lines(recipe, effects))])
        )
    screen.answer("\n".join(blocks))
    for line in dict.fromkeys(
        effects.machine_and_versions_text(e) for r in matches for e in effects.effects_of_recipe(r)
    ):
        screen.note(f"measured on {line}")
    return None


def _effect_lines(recipe: "LibraryFile", effects: "Effects") -> list[str]:
    """Measured effects of a recipe, a line for each model; a module by itself has none."""
    if recipe.is_module:
        return []
    return [e.text() for e in effects.effects_of_recipe(recipe)] or ["not measured"]


def _effects_json(recipe: "LibraryFile", effects: "Effects") -> dict:
    """Of a recipe, not of a module: [] where it was not measured."""
    if recipe.is_module:
        return {}
    measured = effects.effects_of_recipe(recipe)
    return {"effects": [asdict(e) | {"machine": effects.machines[e.machine], "text": e.text()} for e in measured]}


def _mentions(recipe: "LibraryFile", search_term: str) -> bool:
    """Whether a word stands in a recipe: its name, its docstring, its passes, its source."""
    return search_term.lower() in f"{recipe.name} {recipe.text}".lower()


def _copy_recipe_with_files(recipe: "LibraryFile", destination_folder: Path, shared: SharedFlags) -> None:
    """Write a recipe and the files that it names; what is there already stays."""
    from ...core.cache import write_atomic
    from ...plugin.recipe_library import recipe_and_named_files

    files = recipe_and_named_files(recipe)
    conflicts = [
        destination_folder / name for name in files if (destination_folder / name).exists() and name == recipe.name
    ]
    if conflicts:
        raise recipe_there(f"{conflicts[0]} exists", help="name another folder with -o").rejection()
    for name, file in files.items():
        if not (destination_folder / name).exists():
            write_atomic(destination_folder / name, file.read_bytes())
    if shared.format == "json":
        return shared.screen.answer_json("recipes", copied=[str(destination_folder / name) for name in files])
    shared.screen.answer(str(destination_folder / recipe.name))
    copied = quote(str(destination_folder / recipe.name))
    return shared.screen.note(f"next: effc plan {copied}, then effc compile {copied}")


def _find_recipe(name: str, recipes_by_name: "dict[str, LibraryFile]") -> "LibraryFile":
    from ....dsl.syntax.nearest import nearest_name_help

    recipe = recipes_by_name.get(name) or recipes_by_name.get(f"{name}.effspec")
    if recipe is None:
        names = [n.removesuffix(".effspec") for n in recipes_by_name]
        raise unknown_recipe(
            f"the library has no recipe `{name}`", help=nearest_name_help(name, names, "it has")
        ).rejection()
    return recipe


def _print_recipe(name: str, recipes_by_name: "dict[str, LibraryFile]", shared: SharedFlags) -> None:
    from ...plugin.library_effects import Effects

    recipe, effects = _find_recipe(name, recipes_by_name), Effects.read()
    text = recipe.file.source.text
    if shared.format == "json":
        effects_json = _effects_json(recipe, effects)
        return shared.screen.answer_json("recipes", name=recipe.name, path=str(recipe.path), text=text, **effects_json)
    shared.screen.write(text)
    for effect in effects.effects_of_recipe(recipe):
        shared.screen.note(f"\n{effect.table()}\n  {effects.machine_and_versions_text(effect)}, {effect.seconds:.0f} s")
    if not recipe.is_module and not effects.effects_of_recipe(recipe):
        shared.screen.note("not measured")
    return None


def _plugin_table_text(by_kind: "dict[str, list[Word]]", shared: SharedFlags, with_title: bool) -> str:
    width = max((len(w.name) for words in by_kind.values() for w in words), default=0)
    blocks = []
    for kind, words in by_kind.items():
        lines = [f"{shared.screen.styled(w.name.ljust(width), 'cyan')}  {w.summary}" for w in words]
        title = [shared.screen.styled(TITLES[kind], "bold")] if with_title else []
        blocks.append("\n".join([*title, *(lines or ["none"])]))
    return "\n\n".join(blocks)


def _plugin_json(plugin: "Word") -> dict:
    return {
        "name": plugin.name,
        "summary": plugin.summary,
        "params": [
            {"name": p.name, "types": list(p.types), "doc": p.doc, "required": p.required} for p in plugin.params
        ],
    }
