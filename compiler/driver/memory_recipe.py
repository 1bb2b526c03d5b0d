"""Recipe of steps on a model in memory: its text, and a folder of the cache with the text, its model and its rows."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.checker.calls import names_in_expression
from ...dsl.checker.check import check_recipe_file
from ...dsl.syntax import ast
from ...dsl.syntax.builder import Pipeline, Value, call, name, recipe
from ...dsl.syntax.diagnostics import Reject
from ...dsl.syntax.parse import parse
from ...dsl.syntax.source import Source
from ..core.cache import canonical_json_sha256, tensor_hash, write_atomic
from ..core.options import invalid_option
from ..core.quantity import with_article
from ..core.settings import Settings
from ..plugin.word_functions import is_filled_by_data, registry
from .api import Session, build
from .pipeline import Result

if TYPE_CHECKING:
    from torch import Tensor

FILE, MODEL, BASE, PIPELINE = "recipe.effspec", "model", "base", "optimized"


@dataclass(frozen=True)
class InMemoryRecipe:
    """Steps, one after the other, on a model that was in memory.

    rows         by name: steps read the first of them, and bounds the last
    checkpoint   the model's folder in the cache, once it is saved
    """

    steps: Sequence[Value]
    rows: "Mapping[str, Tensor]"
    expect: Sequence[str]
    settings: Settings
    checkpoint: Path = Path(MODEL)

    def to_source(self, target: Value) -> str:
        """Text of the recipe with a target. Raises Reject with all that can be known of it without the model."""
        pipeline = Pipeline(PIPELINE, name(BASE))
        for step in self.steps:
            pipeline.step(_unused_step_name(step, {BASE, *self.rows, *(s.name.path for s in pipeline.steps)}), step)
        pipeline.expect(*self.expect)
        require_call_node(target, "target", 'effc.targets.native("folder")')
        pipeline.emit(target)
        first, last = [*self.rows, ""][0], ["", *self.rows][-1]
        pipeline.steps = [replace(s, call=fill_missing_data(s.call, "pass", first)) for s in pipeline.steps]
        pipeline.bounds = [replace(b, metric=fill_missing_data(b.metric, "metric", last)) for b in pipeline.bounds]
        calls = (*(s.call for s in pipeline.steps), *(b.metric for b in pipeline.bounds))
        names = {n.path for node in calls for n in names_in_expression(node)}
        file = recipe()
        file.model(BASE, call("hf", f"./{MODEL}"))
        for data in (data for data in self.rows if data in names):
            file.data(data, call("tokens", f"{data}.safetensors"))
        file.statements.append(pipeline)
        text = str(file)
        checked = check_recipe_file(parse(Source(FILE, text)).file, registry().vocabulary)
        if any(d.severity == "error" for d in checked.diagnostics):
            raise Reject(*checked.diagnostics)
        return text

    def write(self, text: str) -> Path:
        """The folder beside the model, named by its content, that has the recipe, its rows, and a link to the model."""
        from safetensors.torch import save

        rows = {data: t.contiguous() for data, t in self.rows.items() if f'"{data}.safetensors"' in text}
        hashes = {data: tensor_hash(t) for data, t in rows.items()}
        settings = [self.settings.seed, self.settings.device, self.settings.threads]
        folder = self.checkpoint.parent / canonical_json_sha256([text, hashes, settings])[:16]
        folder.mkdir(exist_ok=True)
        os.utime(self.checkpoint.parent)  # it is in use
        with suppress(FileExistsError):
            (folder / MODEL).symlink_to(Path("..", self.checkpoint.name))
        for data, tensor in rows.items():
            write_atomic(folder / f"{data}.safetensors", save({"rows": tensor}))
        write_atomic(folder / FILE, text.encode())
        return folder

    def compile(self, folder: Path, out: Path, force: bool) -> Result:
        (result,) = build(Session(folder / FILE, self.settings), out, force=force)
        return result


def fill_missing_data(expr: Any, plugin_kind: str, data_name: str) -> Any:
    """A call of a word of a kind with this data where it, or a metric among its arguments, lacks what it requires; a
    pass that lacks its score gets perplexity on them."""
    if isinstance(expr, ast.Items):
        return replace(expr, items=tuple(fill_missing_data(item, plugin_kind, data_name) for item in expr.items))
    node = call(expr.path).node if isinstance(expr, ast.Name) else expr
    word = registry().vocabulary.word(plugin_kind, node.name.path) if isinstance(node, ast.Call) else None
    if word is None:
        return expr
    positional = (p.name for p in word.params if p.positional)
    arguments = [(arg.name or next(positional, ""), arg) for arg in node.args]
    if not data_name:
        lacking = [p.name for p in word.params if is_filled_by_data(word, p) and p.name not in dict(arguments)]
        if lacking and plugin_kind == "pass":
            raise invalid_option(
                f"`{node.name.path}` reads data for its `{lacking[0]}`, and there is none",
                help="give `data=`: texts, or token ids",
            ).rejection()
        return expr
    metrics = {p.name for p in word.params if {"metric", "list[metric]"} & set(p.types)}
    args = [
        replace(a, value=fill_missing_data(a.value, "metric", data_name)) if n in metrics else a for n, a in arguments
    ]
    for param in (p for p in word.params if is_filled_by_data(word, p) and p.name not in dict(arguments)):
        value = name(data_name) if "data" in param.types else call("perplexity", name(data_name))
        args += (call("", value) if param.positional else call("", **{param.name: value})).node.args
    return replace(node, args=tuple(sorted(args, key=lambda a: a.name != ""))) if args else expr


def _unused_step_name(step: Value, used_names: set[str]) -> str:
    """Name of a step, after its pass."""
    node = require_call_node(step, "step", 'effc.prune.multi(remove="15% of params")')
    stem = node.name.path.rpartition(".")[2]
    return next(n for n in _candidate_names(stem) if n not in used_names)


def _candidate_names(stem: str) -> Iterable[str]:
    yield stem
    yield from (f"{stem}_{number}" for number in count(2))


def require_call_node(value: Any, role: str, example_text: str) -> ast.Call:
    """Node of a value that is a call of a word. Raises Reject (bad-option) for another."""
    if not isinstance(value, Value) or not isinstance(value.node, ast.Call):
        raise invalid_option(
            f"a {role} is {with_article(type(value).__name__)}", help=f"write it like `{example_text}`"
        ).rejection()
    return value.node
