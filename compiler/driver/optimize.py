"""`effc.optimize`: steps on a model in memory, and a model in memory again."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ...dsl.syntax.builder import Value, call
from ...dsl.syntax.diagnostics import Diagnostic, Reject
from ...dsl.syntax.render import render
from ..artifacts.artifact import refuse_output_path
from ..artifacts.measures import Measures
from ..core.cache import Cache, write_atomic
from ..core.deadline import out_of_time
from ..core.options import apply_option_rules, integer_rule, invalid_option
from ..core.options import path_rule as path_option
from ..core.settings import Settings
from .emission import Artifact, Page
from .memory_recipe import BASE, FILE, PIPELINE, InMemoryRecipe
from .session_options import Options, session_options, with_current_names

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from ..inputs.memory_rows import Rows

OUT = "out"  # of the recipe's folder
DOUBLED = f"perplexity <= 2 * {BASE}"


def optimize(
    model: "PreTrainedModel | PeftModel",
    *steps: Value,
    tokenizer: Any = None,
    data: "Rows | Mapping[str, Rows] | None" = None,
    expect: str | Sequence[str] = (),
    length: int = 512,
    samples: int = 512,
    **options: Unpack[Options],
) -> "Optimized":
    """Compile steps on a transformers model in memory.

        slim = effc.optimize(model, effc.prune.multi(remove="15% of params"), tokenizer=tokenizer, data=texts)
        slim.model.generate(...)

    The model and its rows are saved in the cache, where a recipe names them: checks, cached steps and resumption are
    those of that recipe (`.recipe`). The model itself stays as it is.

    model       on any device, in any dtype, in training or not; one that peft wraps is merged in a copy
    steps       passes, one after the other: `effc.prune.multi(...)`; `data` and a `score` that they need are filled in
    tokenizer   saved with the model; texts become rows by it
    data        texts (a list, or a column of a data set), or token ids [rows, length]. Of ten and more every tenth row
                is held out to measure by. Or several of them by name: steps read the first, bounds the last
    expect      bounds as recipes write them, `"perplexity <= 1.05 * base"`, on the rows that are held out. Without one,
                perplexity of a language model may double there, and is measured
    length      tokens in a row of text
    samples     rows at most
    options     as of `effc.compile`; `device` is that of the model unless it is named

    Raises Reject for what the user can mend. Missed bounds are in `.missed`, searches that `max_time` ended are
    in `.stopped`.
    """
    from ..inputs.memory_rows import rows_by_name
    from ..models.checkpoints.memory_model import merged_model_or_reject, save_in_cache

    rule = integer_rule(1, 2**31)
    sizes = apply_option_rules({"length": length, "samples": samples}, {"length": rule, "samples": rule})
    settings = _settings(options)
    source = merged_model_or_reject(model)
    if not {"device", "device_map", "settings"} & options.keys():
        settings = replace(settings, device=str(source.device))
    rows = rows_by_name(data, tokenizer, **sizes)
    bounds = [expect] if isinstance(expect, str) else list(expect)
    decodes = source.can_generate() and not getattr(source.config, "is_encoder_decoder", False)
    if not bounds and len(rows) > 1 and decodes:
        bounds = [DOUBLED]
    with carets_in_notes():
        memory_recipe = InMemoryRecipe(steps, rows, bounds, settings)
        text = memory_recipe.to_source(call("hf", PIPELINE))
        Cache(settings.cache_dir)  # refuses a folder that others can write to
        memory_recipe = replace(memory_recipe, checkpoint=save_in_cache(source, tokenizer, settings.cache_dir))
        folder = memory_recipe.write(text)
        result = memory_recipe.compile(folder, folder / OUT, force=True)
    (artifact,) = result.artifacts
    missed, stopped = tuple(result.missed), tuple(result.stopped)
    return Optimized(text, artifact, missed, stopped, str(source.device), memory_recipe, folder)


def _settings(options: Options) -> Settings:
    """Settings of options. Raises Reject (bad-option) for values of params, which such a recipe has none of."""
    settings, overrides, params_file = session_options(with_current_names(options))
    if overrides or params_file:
        raise invalid_option(
            "`set` and `params` are for recipes with params", help="write values into the steps"
        ).rejection()
    return settings


@dataclass(frozen=True, repr=False)
class Optimized:
    """Result of `optimize`; prints as its measures.

    recipe     text of the recipe that it amounts to
    artifact   the checkpoint in the cache: `.path`, `.manifest`
    missed     diagnostics of bounds that were missed
    stopped    diagnostics of searches that `max_time` ended at their best so far
    device     of the model that was given
    """

    recipe: str
    artifact: Artifact
    missed: tuple[Diagnostic, ...]
    stopped: tuple[Diagnostic, ...]
    device: str
    source: InMemoryRecipe
    folder: Path

    def __repr__(self) -> str:
        notes = [f"missed: {diagnostic.message}" for diagnostic in self.missed]
        notes += [f"stopped: {diagnostic.message}" for diagnostic in self.stopped]
        return "\n".join([repr(self.measures), *notes])

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The result as a transformers model in evaluation mode, on the device and in the dtype of the given one."""
        from ..artifacts.load import load

        return load(self.artifact.path, device=None if self.device == "cpu" else self.device)

    @property
    def measures(self) -> Measures:
        """Measures beside the original's, by the metric as the recipe writes it: `perplexity(heldout)`; prints as a
        table."""
        return Measures({measure.metric: measure for measure in self.artifact.manifest.measures})

    def save(self, folder: str | Path) -> Path:
        """A new folder with the recipe, its model and its rows, which compiles to the same artifact (where a search
        was stopped, to that of the full search); the recipe."""
        path = apply_option_rules({"folder": folder}, {"folder": path_option})["folder"]
        refuse_output_path(path, overwrite=False)
        shutil.copytree(self.folder, path, ignore=shutil.ignore_patterns(OUT))
        return path / FILE

    def emit(self, target: Value, out: str | Path = ".", *, force: bool = False) -> Artifact | Page:
        """One more artifact of the result, below `out`: `emit(effc.targets.native("slim-cpu"))`. No step runs again.

        Raises Reject (out-of-time) for the result of a search that was stopped: a compile goes on to another one.
        """
        where = apply_option_rules({"out": out}, {"out": path_option})["out"]
        with carets_in_notes():
            if self.stopped:
                raise out_of_time(
                    "the search was stopped, and a compile for one more target goes on to another model",
                    help="call `effc.optimize` again with more `max_time`, or without: it goes on from there",
                ).rejection()
            unlimited = replace(self.source, settings=replace(self.source.settings, max_time=None))
            result = unlimited.compile(self.source.write(self.source.to_source(target)), where, force)
        emitted: list[Artifact | Page] = [*result.artifacts, *result.reports]
        return emitted[0]

    def report(self, path: str | Path = "report.html") -> Path:
        """One HTML page of it all."""
        from ..artifacts.pages.page import render_html

        file = apply_option_rules({"path": path}, {"path": path_option})["path"]
        write_atomic(file, render_html([self.artifact.report]).encode())
        return file


@contextmanager
def carets_in_notes() -> Iterator[None]:
    """Within it a Reject gets its diagnostics with carets as a note, which tracebacks show."""
    try:
        yield
    except Reject as rejection:
        rejection.add_note(render(rejection.diagnostics))
        raise
