"""From a finished program to an artifact in its place: write, reopen, measure, judge."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...dsl.diagnostics import Diagnostic
from ...dsl.recipe import Emit, Recipe
from ..artifacts.artifact import write
from ..artifacts.manifest import Expectation, Manifest
from ..artifacts.verify import verify
from ..ir.program import Program
from ..judging.comparison import compare
from ..judging.gate import Outcome, bound_text, misses
from ..machine.fingerprint import machine
from ..planning import keys
from ..planning.plan import Plan
from ..planning.profile import packed_widths, profile
from ..report.progress import announce
from ..report.quantity import counted, size
from ..store.cache import Cache
from ..words.context import Context


@dataclass(frozen=True)
class Artifact:
    """What an emit left: where it is, what it says of itself, and the bounds that it misses."""

    path: Path
    manifest: Manifest
    missed: tuple[Diagnostic, ...]

    @property
    def summary(self) -> str:
        checks = self.manifest.checks
        said = f", {counted(len(checks), 'check')} in fresh processes" if checks else ""
        return f"{size(self.manifest.bytes)}{said}"


def emit(program: Program, target: Emit, plan: Plan, cache: Cache, ctx: Context, out: Path, force: bool) -> Artifact:
    """Write an artifact; nothing is in place before a fresh process has computed the same from it."""
    path, judged = out / target.call.args["path"], []

    def build(folder: Path) -> Manifest:
        writer = ctx.shelf.make("target", target.call)
        forms = writer.forms()
        with announce("writing", "then reopening and measuring" if forms else ""):
            writer.emit(program, folder, ctx)
        if not forms:
            return described(program, target, plan, cache, ctx).with_measures(machine=machine())
        with announce("reopening", "then measuring"):
            checks = verify(folder, program.model, forms, seed=ctx.seed)
        with announce("measuring"):
            compared = compare(folder, plan, cache, ctx)
        judged.extend(misses(compared.outcomes))
        return described(program, target, plan, cache, ctx).with_measures(
            checks=checks, measures=compared.measures, machine=machine(),
            expectations=tuple(expectation(o) for o in compared.outcomes), run=compared.run)

    manifest = write(path, build=build, force=force)
    return Artifact(path, manifest, tuple(judged))


def described(program: Program, target: Emit, plan: Plan, cache: Cache, ctx: Context) -> Manifest:
    """The part of a manifest that is the same whenever the recipe is compiled."""
    recipe = plan.recipe
    return Manifest(
        kind=target.call.word, name=plan.pipeline.name, effc=version("effc"),
        recipe={"name": Path(recipe.source.name).name, "text": recipe.source.text, "variant": recipe.variant,
                "params": keys.to_jsonable(recipe.params), "resolved": resolved(recipe)},
        lock={"inputs": inputs(plan, ctx), "versions": keys.versions(), "seed": ctx.seed,
              "threads": ctx.settings.threads, "device": ctx.settings.device},
        steps=tuple(steps(plan, cache, target.source)), edits=program.edits.to_json(),
        profile={"before": profile(plan.skeleton), "after": packed_widths(
            plan.skeleton, program.skeleton, program.edits.swapped, program.edits.layers)})


def steps(plan: Plan, cache: Cache, last: str) -> list[Mapping[str, Any]]:
    """Every step that led to `last`: what it was asked, what it decided and why, what that changed."""
    found, name = [], last
    while name != plan.pipeline.model:
        step = next(s for s in plan.pipeline.steps if s.name == name)
        body = cache.step(plan.key_of(name))
        assert body is not None, f"the result of {name} is not in the cache"
        notes = body["notes"]
        found.append({"name": name, "word": step.call.word, "args": keys.to_jsonable(step.call.args),
                      "summary": notes["summary"], "changes": notes["changes"], "decisions": notes["step"]})
        name = step.source
    return found[::-1]


def inputs(plan: Plan, ctx: Context) -> dict[str, str]:
    """Identity of the model and of every data set."""
    from ...dsl.values import DataRef

    return {plan.model: plan.identity} | {
        f"data {name}": keys.data_identity(DataRef(name), ctx) for name in sorted(ctx.recipe.data)}


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Models and data with all their arguments, defaults too."""
    return {kind: {name: {"word": call.word, "args": keys.to_jsonable(call.args)} for name, call in table.items()}
            for kind, table in (("models", recipe.models), ("data", recipe.data))}


def expectation(outcome: Outcome) -> Expectation:
    state = {"ok": "holds", "missed": "fails", "skipped": "skipped"}[outcome.state]
    line = outcome.bound.span.line if outcome.bound.span else 0
    return Expectation(bound_text(outcome.bound), outcome.value, outcome.limit, state, line, outcome.skipped)

