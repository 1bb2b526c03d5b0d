"""Checks before a compile of what a target would reject at its end."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ....dsl.checker.recipe import Emit, Invocation, Pipeline
from ....dsl.checker.skeleton import Skeleton
from ....dsl.checker.value_text import value_text
from ....dsl.syntax.diagnostics import Fault, Reject
from ...core.environment import check_modules
from ...core.error_location import diagnostics_located_at
from ...core.events import Warned
from ...core.warned import may_be_refused
from ...plugin.context import Context
from ...plugin.interfaces import Lossy
from ...plugin.target import Target

bound_beyond_context = Fault(
    "bound-beyond-context", "A bound times more tokens than a target's artifact continues: `context` says how many."
)

# What a step acts on that leaves every kind of module in place: no such step makes a model what a target takes.
_STAYING = ("linear", "channels", "heads", "kv_heads", "experts", "ssm_heads", "ssm_channels", "ssm_state", "width")


class Forecast(NamedTuple):
    """Skeleton after a step; `qualifier` of its sizes is "" where they are exact."""

    skeleton: Skeleton
    qualifier: str


def refuse_unsupported_targets(pipeline: Pipeline, ctx: Context, forecasts_by_step: Mapping[str, Forecast]) -> None:
    """Raise what a target says of the pipeline's model and steps; a warning where it may turn out otherwise.

    forecasts_by_step   of the model and each step, the skeleton and the qualifier of its sizes, "" where they are exact
    """
    for emit in pipeline.emits:
        with diagnostics_located_at(emit.call):
            target = ctx.registry.make("target", emit.call)
            _refuse_bounds_beyond_context(target, emit, pipeline, ctx)
            check_modules(target.required_modules(), target.extra, f"the target `{emit.call.word}`")
            target.check_requirements(ctx)
            _refuse_or_warn_model(target, emit, pipeline, ctx)
            _refuse_or_warn_missing_steps(target, emit, pipeline, ctx)
            _refuse_or_warn_shapes(target, emit, *forecasts_by_step[emit.source], ctx)


def _refuse_bounds_beyond_context(target: Target, emit: Emit, pipeline: Pipeline, ctx: Context) -> None:
    """Raise Reject for timed bounds whose sequences are longer than the target's artifact continues."""
    context = target.context_tokens()
    if context is None:
        return
    diagnostics = [
        bound_beyond_context(
            f"`{value_text(bound.metric)}` times a sequence of {tokens} tokens, and `{emit.call.word}` continues "
            f"{context}",
            bound.span,
            help=f"write `context: {tokens}`, or give the metric fewer tokens by `prompt`",
        )
        for bound in pipeline.expects
        if bound.part in ("", emit.call.word) and (tokens := ctx.metric(bound.metric).timed_tokens()) > context
    ]
    if diagnostics:
        raise Reject(*diagnostics)


def _refuse_or_warn_model(target: Target, emit: Emit, pipeline: Pipeline, ctx: Context) -> None:
    try:
        target.foresee(ctx)
    except Reject as rejection:
        taking = next((step.name for step in pipeline.steps if _may_remove_modules(step.call, ctx)), None)
        if taking is None:
            raise
        message = f"{emit.call.word} would refuse the model as it is: {rejection.diagnostics[0].message}"
        note = f"it is refused at the end unless `{taking}` takes that out"
        ctx.emit_event(Warned(may_be_refused(message, emit.call.span, note=note)))


def _refuse_or_warn_shapes(target: Target, emit: Emit, forecast: Skeleton, qualifier: str, ctx: Context) -> None:
    try:
        target.foresee_shapes(forecast, ctx)
    except Reject as rejection:
        if not qualifier:
            raise
        message = f"{emit.call.word} would refuse what `{emit.source}` is likely to leave"
        message += f": {rejection.diagnostics[0].message}"
        ctx.emit_event(Warned(may_be_refused(message, emit.call.span, note=f"`{emit.source}` decides when it runs")))


def _refuse_or_warn_missing_steps(target: Target, emit: Emit, pipeline: Pipeline, ctx: Context) -> None:
    lacking = target.lacks([ctx.registry.make("pass", step.call) for step in pipeline.steps_leading_to(emit.source)])
    if lacking is None:
        return
    source: Any = ctx.registry.import_plugin_class("model", ctx.recipe.models[pipeline.model].word)
    if source.plain:
        raise Reject(lacking)
    message = f"no step before {emit.call.word} makes what it needs: {lacking.message}"
    note = f"it is refused at the end unless the weights of `{pipeline.model}` came so"
    ctx.emit_event(Warned(may_be_refused(message, emit.call.span, note=note)))


def _may_remove_modules(call: Invocation, ctx: Context) -> bool:
    """Whether a step may remove whole modules."""
    pass_ = ctx.registry.make("pass", call)
    return isinstance(pass_.keeps, Lossy) and pass_.acts_on not in _STAYING
