"""Measure again what `expect` demands, on artifacts that exist."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ....dsl.checker.recipe import Emit
from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...core.safe_read import read_regular_file

if TYPE_CHECKING:
    from ...analysis.planning.plan import Plan
    from ...artifacts.manifest import Manifest
    from ...core.cache import Cache
    from ...plugin.context import Context
    from ..api import Session
    from .baseline import Drift
    from .comparison import Comparison
    from .gate import BoundVerdict

not_compiled = Fault(
    "not-compiled",
    "No artifact of the recipe is where it should be.\n\nCompile the recipe, or say with `-o` where its artifacts are.",
    exit="usage",
)
missing_recipe = Fault(
    "recipe-lost",
    "The recipe that an artifact was compiled from is not beside it.\n\n"
    "The artifact holds its text, but paths to data are relative to the file. `--recipe FILE` names it.",
    exit="usage",
)
not_run = Fault(
    "not-run",
    "What an artifact gives when it is run was to be judged before it ran.\n\n"
    "`effc run FOLDER` of a federation simulates it and leaves its states beside it.",
    exit="usage",
)
stale_artifact = Fault(
    "stale-artifact",
    "An artifact was compiled from other steps than the recipe has now.\n\n"
    "What it measures says nothing of the recipe: the compile after the last change is missing, or it did not replace "
    "the artifact (`effc compile --force` does). Bounds may change without a compile.",
    exit="usage",
)
RECIPE = 1 << 20  # bytes: more than any has

nothing_expected = Fault("nothing-expected", "A recipe without `expect` was tested.", exit="usage")


@dataclass(frozen=True)
class Tested:
    """One artifact and what came of every bound; `diagnostics` has a place in the recipe for each miss.

    name     of the artifact: its path below the output folder, as the recipe says it
    drifts   every measure against the recipe's baseline, where there is one
    """

    path: Path
    name: str
    plan: "Plan"
    compared: "Comparison"
    diagnostics: tuple[Diagnostic, ...]
    drifts: "tuple[Drift, ...]" = ()

    @property
    def pipeline(self) -> str:
        return self.plan.pipeline.name

    @property
    def outcomes(self) -> "tuple[BoundVerdict, ...]":
        return self.compared.outcomes

    @property
    def passed(self) -> bool:
        return all(o.passed for o in self.outcomes)


def remeasure_recipe(
    session: "Session", plans: "Sequence[Plan]", out_folder: Path, write_baselines: bool = False
) -> list[Tested]:
    """Measure every artifact below a folder that the recipe emits, against the bounds that it has now and its baseline.

    write_baselines   write a baseline of what is measured instead
    """
    from ...artifacts.manifest import NAME, read_manifest
    from . import baseline

    artifacts: list[tuple[Path, Plan]] = []
    stale: list[Diagnostic] = []
    for plan in plans:
        for emit in plan.pipeline.emits:
            path = plan.folder(out_folder) / str(emit.call.args["path"])
            if (path / NAME).is_file() and _has_model(read_manifest(path)):
                artifacts.append((path, plan))
                stale += _stale_artifact_diagnostics(path, emit, plan)
    if not artifacts:
        raise not_compiled(
            f"{out_folder} holds no artifact of {session.path}",
            help=f"effc compile {quote(str(session.path))}, or name their folder with -o",
        ).rejection()
    if stale:
        raise Reject(*stale)
    results = _remeasure_bounded_artifacts(artifacts, session, compare_with_baseline=not write_baselines)
    if write_baselines:
        baseline.write_baseline(session.path, results, lambda plan: session.context(plan.recipe, plan.pipeline))
    return results


def _stale_artifact_diagnostics(path: Path, emit: Emit, plan: "Plan") -> Iterator[Diagnostic]:
    """A complaint where an artifact came of other steps than the recipe has, at the first that is another."""
    from ...analysis.planning.keys import to_jsonable
    from ...artifacts.manifest import read_manifest

    done = [(s["name"], s["word"], s["args"]) for s in read_manifest(path).steps]
    for then, step in zip_longest(done, plan.pipeline.step_and_ancestors(emit.source)):
        if step is None or then != (step.name, step.call.word, to_jsonable(step.call.args)):
            message = f"`{step.name}` is another now" if step else f"`{then[0]}` is gone"
            yield stale_artifact(
                f"{path} was compiled from other steps: {message}",
                step.call.span if step else plan.pipeline.span,
                help="compile the recipe again, with --force since the artifact stands there",
            )
            return


def recipe_and_params(path: Path, recipe: Path | None) -> tuple[Path, dict[str, Any]]:
    """The recipe of an artifact that holds a model, `recipe` or the one beside it, and the params that it was given."""
    from ...artifacts.load import other_kind
    from ...artifacts.manifest import read_manifest

    manifest = read_manifest(path)
    if not _has_model(manifest):
        raise other_kind(
            f"{path} was written by the target `{manifest.kind}` and holds no model to measure",
            help="test the artifact of another target of the same recipe",
        ).rejection()
    file = recipe or find_recipe_file(path, manifest)
    if file is None:
        name = manifest.recipe.get("name", "its recipe")
        raise missing_recipe(
            f"{name}, which {path} was compiled from, is not beside it", help="name it with --recipe"
        ).rejection()
    return file, params_set_at_compile(manifest)


def remeasure_artifact(path: Path, session: "Session", plans: "Sequence[Plan]") -> list[Tested]:
    """Measure one artifact against the bounds of the recipe that it was compiled from."""
    from ...artifacts.manifest import read_manifest

    manifest = read_manifest(path)
    variant = manifest.recipe.get("variant", "")
    matching = [p for p in plans if (p.pipeline.name, p.recipe.variant) == (manifest.name, variant)]
    if not matching:
        raise missing_recipe(
            f"{session.path} has no pipeline `{manifest.name}` any more",
            help="name the recipe of the artifact with --recipe",
        ).rejection()
    return _remeasure_bounded_artifacts([(path, matching[0])], session)


def _remeasure_bounded_artifacts(
    artifacts: "list[tuple[Path, Plan]]", session: "Session", compare_with_baseline: bool = True
) -> list[Tested]:
    if not any(plan.pipeline.expects for _, plan in artifacts):
        raise nothing_expected(
            f"{session.path} expects nothing", help="add `expect NAME { params <= 0.9 * base }`"
        ).rejection()
    spoken = [(path, plan) for path, plan in artifacts if _has_bound_on(plan, path)]
    if not spoken:
        raise nothing_expected(
            f"no bound of the recipe speaks of {artifacts[0][0]}",
            help="its bounds are `in` other artifacts or points: test those",
        ).rejection()
    from . import baseline

    body = baseline.read_baseline(session.path) if compare_with_baseline else None
    if body is None:
        return [_remeasure_one(path, plan, session) for path, plan in spoken]
    entries = [
        baseline.find_comparable_entry(
            body,
            baseline.baseline_entry_key(plan, _artifact_name(path, plan)),
            plan,
            session.context(plan.recipe, plan.pipeline),
        )
        for path, plan in spoken
    ]
    judged = []
    for (path, plan), entry in zip(spoken, entries, strict=True):
        result = _remeasure_one(path, plan, session)
        drifts = baseline.compare_to_baseline(body, entry, result)
        complaints = tuple(baseline.drift_diagnostics(drifts, body, session.settings.undecided))
        judged.append(replace(result, drifts=drifts, diagnostics=(*result.diagnostics, *complaints)))
    return judged


def _has_bound_on(plan: "Plan", path: Path) -> bool:
    """Whether any bound is asked of an artifact; of a front every one may be."""
    from ...artifacts.manifest import read_manifest

    manifest = read_manifest(path)
    return any(manifest.members or bound.part in ("", manifest.kind) for bound in plan.pipeline.expects)


def _remeasure_one(path: Path, plan: "Plan", session: "Session") -> Tested:
    from ...artifacts.manifest import verify_files
    from ...core.cache import Cache
    from ...core.events import StageBegan, StageEnded, tick
    from ..models import model_errors_as_diagnostics
    from .gate import unmet_bound_diagnostics

    listener = session.settings.on_event
    listener(StageBegan(f"test {plan.pipeline.name}", str(path)))
    tick("opening the artifact and the original")
    verify_files(path)
    ctx = session.context(plan.recipe, plan.pipeline)
    with model_errors_as_diagnostics(str(path)):
        compared = _judge_artifact(path, plan, Cache(session.settings.cache_dir), ctx)
    listener(StageEnded(f"test {plan.pipeline.name}", compared.run["seconds"]["measure"]))
    missed = unmet_bound_diagnostics(compared.outcomes, session.settings.undecided)
    return Tested(path, _artifact_name(path, plan), plan, compared, tuple(missed))


def _artifact_name(path: Path, plan: "Plan") -> str:
    """Name of an artifact in the recipe; one that was moved goes by its folder's name."""
    emitted = [str(e.call.args["path"]) for e in plan.pipeline.emits]
    tails = path.resolve().parts
    return next((name for name in emitted if tails[-len(Path(name).parts) :] == Path(name).parts), path.resolve().name)


def _has_model(manifest: "Manifest") -> bool:
    """Whether an artifact holds a model, or several."""
    from ...artifacts.load import has_checkpoint

    return bool(manifest.members) or has_checkpoint(manifest)


def _judge_artifact(path: Path, plan: "Plan", cache: "Cache", ctx: "Context") -> "Comparison":
    """The bounds that speak of an artifact, judged on what lies there."""
    from ...artifacts.load import checkpoint_folder_by_point, load_to_judge, target_facts
    from ...artifacts.manifest import read_manifest
    from .comparison import measure_beside_original
    from .verdicts import Verdicts

    def open_form(folder: Path) -> Any:
        return load_to_judge(folder, ctx.settings.device)

    manifest = read_manifest(path)
    if manifest.members:
        models = ((name, open_form(folder)) for name, folder in checkpoint_folder_by_point(path, manifest))
        return Verdicts(plan, cache, ctx).judge_front(models)[0]
    target: Any = ctx.registry.import_plugin_class("target", manifest.kind)
    results = target.results(path, ctx)
    bounds = tuple(b for b in plan.pipeline.expects if b.part in ("", manifest.kind))
    if results is not None:
        bounds = tuple(replace(b, part="") for b in bounds)
    elif target_facts(manifest.kind).get("later") and any(b.part for b in bounds):
        raise not_run(
            f"{path} has not run, and bounds speak of what it gives", help=f"effc run {quote(str(path))}, then test it"
        ).rejection()
    plan = replace(plan, pipeline=replace(plan.pipeline, expects=bounds))
    if results is not None:
        return Verdicts(plan, cache, ctx).judge_front(results)[0]
    return measure_beside_original(open_form(path), plan, cache, ctx)


def find_recipe_file(path: Path, manifest: "Manifest") -> Path | None:
    """The recipe's file in a folder above the artifact, in the working folder or in the library, with the same text."""
    from ...plugin.recipe_library import library_files

    name, text = manifest.recipe.get("name"), manifest.recipe.get("text")
    for folder in _folders_to_search(path):
        file = folder / str(name)
        if name and _has_text(file, str(text)):
            return file
    candidates = (recipe.path for recipe in library_files().values() if recipe.path.name == name)
    return next((file for file in candidates if _has_text(file, str(text))), None)


def _has_text(file: Path, text: str) -> bool:
    """Whether a file holds a text; the artifact that names it may come from anybody."""
    try:
        return file.is_file() and read_regular_file(file, RECIPE).decode(errors="replace") == text
    except (OSError, ValueError, Reject):
        return False


def _folders_to_search(path: Path) -> Iterator[Path]:
    yield from path.absolute().parents
    cwd = Path.cwd()
    yield cwd
    yield from sorted(f for f in cwd.glob("*/") if not f.name.startswith("."))


def params_set_at_compile(manifest: "Manifest") -> dict[str, Any]:
    """The params that the artifact was compiled with, as `--set` would say them; not those of a matrix."""
    from ....dsl.checker.value_text import plain_value_text
    from ....dsl.checker.values import value_from_json

    swept = {pair.partition("=")[0].strip() for pair in str(manifest.recipe.get("variant", "")).split(",")}
    params = manifest.recipe.get("params", {})
    return {name: plain_value_text(value_from_json(value)) for name, value in params.items() if name not in swept}
