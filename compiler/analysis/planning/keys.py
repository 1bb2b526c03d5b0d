"""Cache key of a step, part by part, and the reason for a miss."""

import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ....dsl.checker.recipe import Invocation, Recipe
from ....dsl.checker.values import DataRef, MetricRef, ProfileRef, StepRef, references_in, value_to_json
from ...core.cache import canonical_json_sha256
from ...core.environment import installed_version
from ...core.error_location import diagnostics_located_at
from ...core.fingerprint import machine_facts
from ...core.hashes import cached_file_hash
from ...core.source_closure import import_closure_sha256
from ...plugin.context import Context

FORMAT = 1
LOADING = Path(__file__).parents[2] / "models" / "checkpoints" / "checkpoint.py"  # how weights become a model
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")


def step_key_parts(call: Invocation, source_key: str, ctx: Context, key_by_step: Mapping[str, str]) -> dict[str, Any]:
    """The parts of a step's key, the most telling first.

    source_key    key of the result that it works on, or the identity of the model
    key_by_step   keys of the results of the steps before it, by name
    """
    words = [("pass", call.word), *(("metric", m.name) for m in references_in(call.args, MetricRef))]
    data = {ref.name: data_identity(ref, ctx) for ref in references_in(call.args, DataRef)}
    words += [("data", ctx.recipe.data[name].word) for name in data]
    return (
        {
            "step": {"word": call.word, "args": to_jsonable(call.args)},
            "input": source_key,
            "data": data,
            "files": hash_by_file(call, ctx),
            "seed": ctx.settings.seed,
            "source": {f"{kind} {name}": plugin_source_fingerprint(kind, name, ctx) for kind, name in words},
            "libraries": library_versions(*ctx.registry.vocabulary.word("pass", call.word).facts.get("requires", ())),
            "device": ctx.settings.device,
            "threads": ctx.settings.threads,
            "format": FORMAT,
        }
        | _keys_of_named_results(call, key_by_step)
        | (_machine_key_parts(call, ctx) if ctx.registry.make("pass", call).reads_clock() else {})
    )


def _keys_of_named_results(call: Invocation, key_by_step: Mapping[str, str]) -> dict[str, Any]:
    """Keys of the results that a call names besides the one it follows; nothing where it names none."""
    named = {ref.name: key_by_step[ref.name] for ref in references_in(call.args, StepRef)}
    return {"results": named} if named else {}


def _machine_key_parts(call: Invocation, ctx: Context) -> dict[str, Any]:
    profiles = {ref.name: to_jsonable(ctx.recipe.profiles[ref.name]) for ref in references_in(call.args, ProfileRef)}
    return {"machine": machine_facts()} | ({"profiles": profiles} if profiles else {})


def hash_by_file(call: Invocation, ctx: Context) -> dict[str, str]:
    """Hashes of the files that a pass reads, by the paths in the recipe; "" for one that is not there."""
    named = ctx.registry.make("pass", call).files()
    folder = ctx.relative_to(call).folder
    return {
        n: cached_file_hash(folder / n, ctx.settings.cache_dir) if os.path.isfile(folder / n) else "" for n in named
    }


def data_identity(ref: DataRef, ctx: Context) -> str:
    """Hash of a data set's content, parameters and tokenizer."""
    call = ctx.recipe.data[ref.name]
    with diagnostics_located_at(call):
        return ctx.data(ref).identity(ctx.relative_to(call))


def plugin_source_fingerprint(plugin_kind: str, name: str, ctx: Context) -> str:
    word = ctx.registry.vocabulary.word(plugin_kind, name)
    assert word, f"no {plugin_kind} {name}"
    return import_closure_sha256(Path(word.path))


def library_versions(*extra_libraries: str) -> dict[str, str]:
    """Versions of the libraries that every result depends on, and of others; "" where one is missing."""
    return {name: metadata.version(name) for name in LIBRARIES} | {
        name: installed_version(name) for name in extra_libraries
    }


def to_jsonable(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value_to_json(value) for name, value in sorted(args.items())}


def metric_value_key_parts(metric: MetricRef, model_identity: str, ctx: Context) -> dict[str, Any]:
    """The parts of a measured value's key; `model_identity` is the identity of the model measured."""
    data = {ref.name: data_identity(ref, ctx) for ref in references_in(dict(metric.args), DataRef)}
    return {
        "metric": value_to_json(metric),
        "model": model_identity,
        "data": data,
        "source": plugin_source_fingerprint("metric", metric.name, ctx),
        "loading": import_closure_sha256(LOADING),
        "libraries": library_versions(),
        "device": ctx.settings.device,
        "threads": ctx.settings.threads,
    }


def key_of_parts(key_parts: Mapping[str, Any]) -> str:
    return canonical_json_sha256(key_parts)


def data_named(recipe: Recipe, value: Any) -> list[str]:
    return [ref.name for ref in references_in(value, DataRef)]
