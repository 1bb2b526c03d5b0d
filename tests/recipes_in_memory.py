"""Recipes and contexts made without text, for tests of passes and of the pipeline."""

import copy
from pathlib import Path

import torch
from effc.compiler.core.settings import Settings
from effc.compiler.models.checkpoints.origin import Origin
from effc.compiler.plugin.context import Context
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.recipe import Emit, Invocation, Pipeline, Recipe, Step
from effc.dsl.checker.values import Bytes, DataRef, MetricRef
from effc.dsl.syntax.source import Source
from safetensors.torch import save_file

SCORE = MetricRef("perplexity", (("data", DataRef("rows")),))
DEFAULTS = {
    "prune.blocks": {"on": None, "unit": "branch", "score": SCORE, "search": "exact"},
    "prune.channels": {
        "on": None,
        "align": 32,
        "score": None,
        "search": "exact",
        "reorder": "l1",
        "repair": False,
        "data": None,
    },
    "prune.heads": {"on": None, "score": None, "search": "exact", "reorder": "l1", "repair": False, "data": None},
}


def origin_of(model: torch.nn.Module, identity: str = "tiny") -> Origin:
    """A source that gives copies of a model that is in memory."""

    def build():
        return type(model)(copy.deepcopy(model.config))

    stated = getattr(model, "config", None)  # a plain module has none
    config = {} if stated is None else {**stated.to_dict(), "architectures": [type(model).__name__]}
    return Origin("tiny", config, None, identity, build, lambda: copy.deepcopy(model), lambda: None)


def recipe_of(steps, emits=(), expects=()) -> Recipe:
    """A recipe of one pipeline; `steps` are (name, pass, arguments), each on the one before."""
    names = ["base", *(name for name, _, _ in steps)]
    made = tuple(
        Step(name, Invocation(word, {**DEFAULTS.get(word, {}), **args}), source)
        for (name, word, args), source in zip(steps, names, strict=False)
    )
    targets = tuple(
        Emit(Invocation("hf", {"path": path, "form": "auto", "shard": Bytes(5 * 10**9)}), names[-1]) for path in emits
    )
    pipeline = Pipeline("lean", "base", made, tuple(expects), targets)
    data = {"rows": Invocation("tokens", {"path": "rows.safetensors", "tensor": None, "samples": None, "seed": None})}
    return Recipe(
        Source("tiny.effspec", "effspec 1\n"),
        "",
        {},
        {"base": Invocation("zoo", {"name": "tiny"})},
        data,
        {},
        {"lean": pipeline},
    )


def context_of(tmp_path: Path, model: torch.nn.Module, recipe: Recipe, rows: torch.Tensor | None = None) -> Context:
    """A context whose data `rows` are random tokens [4, 12] unless given."""
    if rows is None:
        rows = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(1))
    save_file({"rows": rows}, tmp_path / "rows.safetensors")
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    settings = Settings(tmp_path / "cache", threads=torch.get_num_threads())
    return Context(settings, recipe, tmp_path, Registry(), origin_of(model), work)
