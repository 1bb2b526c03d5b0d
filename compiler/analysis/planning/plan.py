"""Plan of a compile: matched modules, sizes before and after, cost, and what the cache already has.

Reads configs and skeletons, never weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ....dsl.checker.recipe import Invocation, Pipeline, Recipe
from ....dsl.checker.skeleton import Skeleton
from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import is_value_json, value_from_json
from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.source import Span
from ...core.cache import Cache
from ...core.environment import check_modules
from ...core.error_location import diagnostics_located_at
from ...core.quantity import change_text, duration_text, si_count, size_text
from ...plugin.context import Context
from ...plugin.interfaces import Pass
from . import keys, shrink
from .cost import Emission, estimate_emission, estimate_step_seconds, token_or_image_count
from .drawing import unprunable_part_lines
from .peak_memory import changed_bytes, estimate_peak_bytes
from .selection import (
    branches,
    groups,
    inner_parts,
    layers,
    linear_parts,
    removable_branches,
    scans,
    searchable_branch_groups_by_kind,
    state_space_branches,
)
from .target_support import Forecast, refuse_unsupported_targets

plan_drift = Fault("plan-drift", "A saved plan no longer describes what a compile would do.")
FORMAT = 1


@dataclass(frozen=True)
class Size:
    """`flops` per token at a context of 512 tokens; `bytes` of the weights as they are stored."""

    params: int
    flops: int
    bytes: int

    @staticmethod
    def of(skeleton: Skeleton) -> "Size":
        return Size(shrink.param_count(skeleton), shrink.flops_per_token(skeleton, 512), shrink.param_bytes(skeleton))


@dataclass(frozen=True)
class Stage:
    """One step.

    key, parts   what its result is kept under, and what that is made of
    source       the key of the result that it works on
    matched      what it may touch
    exact        whether `after` is known, or the likely outcome of a search
    seconds      an estimate from this machine's speeds; peak_bytes and disk_bytes likewise from shapes
    spare_bytes  on disk besides, while it runs
    cached, why  whether the result is kept; if not, the first part of the key that differs
    """

    name: str
    call: Invocation
    key: str
    parts: Mapping[str, Any]
    source: str
    matched: tuple[str, ...]
    before: Size
    after: Size
    hedges: tuple[str, str]
    forwards: int
    seconds: float
    peak_bytes: int
    disk_bytes: int
    spare_bytes: int
    cached: bool
    reason: str

    @property
    def span(self) -> Span | None:
        return self.call.span


@dataclass(frozen=True)
class Plan:
    """The stages of one pipeline of one variant, each after those that it works on."""

    recipe: Recipe = field(repr=False)
    pipeline: Pipeline = field(repr=False)
    model: str  # label of the source
    identity: str  # hash of what decides the weights
    stages: tuple[Stage, ...]
    skeleton: Skeleton = field(repr=False)
    emissions: tuple[Emission, ...] = ()

    @property
    def has_work(self) -> bool:
        return not all(stage.cached for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Of the steps that run, and of the targets."""
        running = [s.peak_bytes for s in self.stages if not s.cached]
        return max((*running, *(e.peak_bytes for e in self.emissions)), default=0)

    @property
    def seconds(self) -> float:
        return sum(s.seconds for s in self.stages if not s.cached) + sum(e.seconds for e in self.emissions)

    def folder(self, output_folder: Path) -> Path:
        """The folder that the variant's artifacts go into."""
        return output_folder / self.recipe.variant if self.recipe.variant else output_folder

    def key_of(self, step_name: str) -> str:
        """The key of a step's result; of the model itself, its identity."""
        return next((s.key for s in self.stages if s.name == step_name), self.identity)

    def with_stopped_search(self, step_name: str, stop_facts: Mapping[str, Any]) -> "Plan":
        """Plan in which a step's search was stopped: its result has another key, and so has all that follows."""
        new_keys: dict[str, str] = {}
        stages = []
        for stage in self.stages:
            parts = dict(stage.parts)
            if stage.name == step_name:
                parts["stopped"] = dict(stop_facts)
            parts["input"] = new_keys.get(parts["input"], parts["input"])
            if "results" in parts:
                parts["results"] = {n: new_keys.get(key, key) for n, key in parts["results"].items()}
            if parts != stage.parts:
                new_keys[stage.key] = keys.key_of_parts(parts)
                source = new_keys.get(stage.source, stage.source)
                stage = replace(stage, parts=parts, key=new_keys[stage.key], source=source)
            stages.append(stage)
        return replace(self, stages=tuple(stages))

    def to_json(self) -> dict[str, Any]:
        """JSON of a plan as `plan -o` saves it; keys and sizes decide drift, estimates don't."""
        stages = [
            {
                "name": s.name,
                "word": s.call.word,
                "args": keys.to_jsonable(s.call.args),
                "key": s.key,
                "parts": s.parts,
                "matched": list(s.matched),
                "before": vars(s.before),
                "after": vars(s.after),
                "hedges": list(s.hedges),
                "forwards": s.forwards,
                "seconds": round(s.seconds, 1),
                "peak_bytes": s.peak_bytes,
                "cached": s.cached,
                "why": s.reason,
            }
            for s in self.stages
        ]
        emits = [{"target": e.call.word, "path": e.call.args["path"], "of": e.source} for e in self.pipeline.emits]
        taking = [
            {
                "seconds": round(e.seconds, 1),
                "peak_bytes": e.peak_bytes,
                "disk_bytes": e.disk_bytes,
                "weight_bytes": e.weight_bytes,
            }
            for e in self.emissions
        ]
        return {
            "pipeline": self.pipeline.name,
            "variant": self.recipe.variant,
            "model": self.model,
            "identity": self.identity,
            "stages": stages,
            "emits": emits,
            "emissions": taking,
        }


def plan_pipeline(recipe: Recipe, pipeline: Pipeline, ctx: Context, skeleton: Skeleton) -> Plan:
    """The plan of a pipeline; `skeleton` is that of its model."""
    store = Cache(ctx.settings.cache_dir)
    done: dict[str, tuple[str, Skeleton, str]] = {pipeline.model: (ctx.origin.identity, skeleton, "")}
    stages = []
    for step in pipeline.steps:
        first = step.source == pipeline.model
        with diagnostics_located_at(step.call):
            known = {name: key for name, (key, _, _) in done.items()}
            stage, after = _plan_stage(step.name, step.call, *done[step.source], first, ctx, store, known)
        done[step.name] = (stage.key, after, stage.hedges[1])
        stages.append(stage)
    refuse_unsupported_targets(pipeline, ctx, {name: Forecast(*result[1:]) for name, result in done.items()})
    emissions = tuple(estimate_emission(emit, done[emit.source][1], skeleton, pipeline, ctx) for emit in pipeline.emits)
    return Plan(recipe, pipeline, ctx.origin.label, ctx.origin.identity, tuple(stages), skeleton, emissions)


def _plan_stage(
    name: str,
    call: Invocation,
    source_key: str,
    before: Skeleton,
    qualifier_before: str,
    is_first_step: bool,
    ctx: Context,
    store: Cache,
    key_by_step: Mapping[str, str],
) -> tuple[Stage, Skeleton]:
    pass_ = ctx.registry.make("pass", call)
    after = pass_.forecast(before)
    parts = keys.step_key_parts(call, source_key, ctx, key_by_step)
    forwards = pass_.forwards(before)
    effort = pass_.effort(before, ctx)
    tokens = effort.tokens + (forwards * _token_count_of_arguments(call, ctx) if forwards else 0)
    key = keys.key_of_parts(parts)
    cached = store.is_step_complete(key)
    if not cached:
        check_modules(pass_.required_modules(), pass_.extra, f"`{call.word}`")
    stage = Stage(
        name,
        call,
        key,
        parts,
        source_key,
        affected_paths(before, pass_, call),
        Size.of(before),
        Size.of(after),
        hedges=(qualifier_before, _size_qualifier_after(pass_, forwards, qualifier_before)),
        forwards=forwards,
        seconds=0.0 if cached else estimate_step_seconds(call, before, after, is_first_step, effort, tokens, ctx),
        peak_bytes=estimate_peak_bytes(call, before, after, is_first_step, ctx, effort),
        disk_bytes=changed_bytes(call, before, after),
        spare_bytes=effort.files,
        cached=cached,
        reason="" if cached else store.cache_miss_reason(parts),
    )
    return stage, after


def _size_qualifier_after(pass_: Pass, num_forwards: int, qualifier_before: str) -> str:
    """Qualifier of the size after a step, given that of the size before it."""
    return "at most" if not pass_.foreseeable else qualifier_before or ("about" if num_forwards else "")


def affected_paths(skeleton: Skeleton, pass_: Pass, call: Invocation) -> tuple[str, ...]:
    """Paths of what a step may touch."""
    acts_on, on = pass_.acts_on, call.args.get("on")
    if acts_on == "branches":
        by_layer = call.args.get("unit") == "layer"
        if by_layer:
            return layers(skeleton, on)
        if "order" not in call.args:
            return tuple(b.site for b in removable_branches(skeleton, on))
        inside = [g.site for some in searchable_branch_groups_by_kind(skeleton, on).values() for g in some]
        return tuple(b.site for b in branches(skeleton, on)) or tuple(dict.fromkeys(inside))
    if acts_on == "layers":
        return layers(skeleton, on)
    if acts_on == "ssm":
        return tuple(b.site for b in state_space_branches(skeleton, on))
    if acts_on == "scans":
        return tuple(s.site for s in scans(skeleton, on))
    if acts_on in ("channels", "heads", "kv_heads", "experts", "ssm_heads", "ssm_channels", "ssm_state"):
        return tuple(g.site for g in groups(skeleton, acts_on, on))
    if acts_on == "width":
        members = skeleton.stream.members if skeleton.stream else ()
        return tuple(dict.fromkeys(m.tensor.rpartition(".")[0] for m in members))
    if acts_on == "linear":
        return tuple(p.path for p in (linear_parts if pass_.everywhere else inner_parts)(skeleton, on))
    return ()


def _token_count_of_arguments(call: Invocation, ctx: Context) -> int:
    """Number of tokens that one score reads."""
    names = keys.data_named(ctx.recipe, call.args)
    rows = [ctx.tokenize_rows_once(name) for name in names]
    return sum(map(token_or_image_count, rows))


def refuse_plan_drift(saved_plans: Any, current: Sequence[Plan]) -> None:
    """Raise Reject (plan-drift) naming the first thing that is not as it was when the plans were saved."""
    if not (
        isinstance(saved_plans, dict)
        and saved_plans.get("format") == FORMAT
        and isinstance(saved_plans.get("plans"), list)
    ):
        raise plan_drift(
            f"the saved plan is not of format {FORMAT}", help="make it again with `effc plan -o`"
        ).rejection()
    _refuse_drift("the number of pipelines", len(saved_plans["plans"]), len(current))
    for old, plan in zip(saved_plans["plans"], current, strict=True):
        fresh = plan.to_json()
        for name in ("pipeline", "variant", "model", "identity", "emits"):
            _refuse_drift(name, old.get(name), fresh[name])
        _refuse_drift("the number of steps", len(old.get("stages", ())), len(fresh["stages"]))
        for then, today in zip(old["stages"], fresh["stages"], strict=True):
            for part, value in today["parts"].items():
                part_name, before, after = _first_differing_path_and_values(
                    [part], then.get("parts", {}).get(part), value
                )
                _refuse_drift(f"`{part_name}` of step {today['name']}", before, after)


def _first_differing_path_and_values(key_path: list[str], saved: Any, current: Any) -> tuple[str, Any, Any]:
    """The first thing in two parts that is not the same: what it is called, and both."""
    while (
        isinstance(saved, dict)
        and isinstance(current, dict)
        and saved != current
        and not (is_value_json(saved) and is_value_json(current))
    ):
        name = next(k for k in (*saved, *current) if saved.get(k) != current.get(k))
        key_path, saved, current = [*key_path, name], saved.get(name), current.get(name)
    return " ".join(n for n in key_path if n not in ("step", "args")) or key_path[0], saved, current


def _refuse_drift(label: str, saved: Any, current: Any) -> None:
    if saved != current:
        raise plan_drift(
            f"{label} was {_brief(saved)} when the plan was made and is {_brief(current)} now",
            help="look at `effc plan` again, and save it with -o if it is what you want",
        ).rejection()


def saved_plans_to_json(plans: Sequence[Plan]) -> dict[str, Any]:
    """JSON that `plan -o` writes."""
    return {"format": FORMAT, "plans": [p.to_json() for p in plans]}


def _brief(value: Any) -> str:
    text = value_text(value_from_json(value)) if not isinstance(value, str) and is_value_json(value) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plan_text(plan: Plan, width: int = 100) -> str:
    """The plan as text: a block per step and a line for the whole."""
    title = plan.pipeline.name + (f" [{plan.recipe.variant}]" if plan.recipe.variant else "")
    first = plan.stages[0].before if plan.stages else Size.of(plan.skeleton)
    lines = [f"{title}: {plan.model}, {si_count(first.params)} parameters, {size_text(first.bytes)}", ""]
    for index, stage in enumerate(plan.stages, 1):
        lines += _stage_lines(index, stage, width)
    lines += [f"  note: {remark}" for remark in unprunable_part_lines(plan.skeleton)]
    hedges = {stage.name: stage.hedges[1] for stage in plan.stages}
    for planned in plan.emissions:
        hedge = "at most " if hedges.get(planned.source) == "at most" else ""
        cost = f"about {duration_text(planned.seconds)}, {hedge}{size_text(planned.disk_bytes)} on disk"
        lines.append(f"  emit {planned.call.word} to {planned.call.args['path']}: {cost}")
    work = f"{sum(not s.cached for s in plan.stages)} of {len(plan.stages)} steps to run"
    cost = f", about {duration_text(plan.seconds)}, peak {size_text(plan.peak_bytes)}"
    return "\n".join([*lines, "", f"{work}{cost}"])


def _stage_lines(index: int, stage: Stage, width: int) -> list[str]:
    before, after = (f"{hedge} ".lstrip() for hedge in stage.hedges)
    state = "cached" if stage.cached else f"to run: {stage.reason}"
    change = f"({change_text(stage.before.params, stage.after.params)})"
    if stage.before == stage.after and after == "at most ":
        change = "(known once it has run)"
    lines = [
        f"  {index}. {stage.name} = {stage.call.word}",
        f"     touches   {_paths_text(stage.matched, width - 15)}" if stage.matched else "",
        f"     params    {before}{si_count(stage.before.params)} -> {after}{si_count(stage.after.params)}  {change}",
        f"     flops     {before}{si_count(stage.before.flops)} -> {after}{si_count(stage.after.flops)} per token",
        f"     bytes     {before}{size_text(stage.before.bytes)} -> {after}{size_text(stage.after.bytes)}",
    ]
    if not stage.cached:
        scores = f"{stage.forwards} scores, " if stage.forwards else ""
        lines.append(f"     takes     about {scores}{duration_text(stage.seconds)}, peak {size_text(stage.peak_bytes)}")
    return [*filter(None, lines), f"     cache     {state}", ""]


def _paths_text(paths: tuple[str, ...], width: int) -> str:
    text = f"{len(paths)}: " + ", ".join(paths)
    return text if len(text) <= width else f"{len(paths)}: {paths[0]} … {paths[-1]}"
