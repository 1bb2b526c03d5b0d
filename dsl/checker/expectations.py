"""Checks of `expect` and `emit`."""

from collections.abc import Iterable
from typing import Any

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault
from ..syntax.source import Span
from .calls import check_plugin_call, metric_ref
from .literals import literal_value
from .pipelines import PipelineBuild, resolve_from_argument
from .recipe import Bound, Emit
from .result_kinds import report_unholdable_result
from .scope import POISON, Scope
from .type_phrases import expected_phrase
from .typed import kind_mismatch_diagnostic, typed_value, unit_mismatch
from .value_text import shortest_decimal
from .values import Range, Ratio
from .vocabulary import Param, Word

invalid_bound = Fault("bad-bound", "A bound's operator and its limit don't belong together.")
invalid_path = Fault("bad-path", "An artifact would be written outside of the output folder, or nowhere.")
path_clash = Fault("path-clash", "Two artifacts of a recipe would be written to one place.")
cannot_hold = Fault("cannot-hold", "A target can't represent what a pass before it makes.")
unmeasured = Fault("unmeasured", "A metric leaves out what a pass before it does to the outputs.", severity="warning")
nothing_emitted = Fault("nothing-emitted", "A pipeline's result is not written anywhere.", severity="warning")

_SIZES = {"B", "byte", "bytes", "KiB", "MiB", "GiB", "kB", "MB", "GB"}
_TIMES = {"ns", "us", "µs", "ms", "s", "min", "h"}


def read_bound(node: ast.Bound, scope: Scope) -> Bound | None:
    """A checked bound, or None with its faults reported."""
    metric = metric_ref(node.metric, scope)
    unit = "" if metric is POISON else scope.session.vocabulary.words("metric")[metric.name].facts.get("unit", "")
    profile = _name_of_declared_entry(node.profile, "profile", scope) if node.profile else None
    baseline = _name_of_declared_entry(node.limit.baseline, "model", scope) if node.limit.baseline else None
    limit = _read_limit(node, "" if metric is POISON else unit, scope, is_known_metric=metric is not POISON)
    confidence = _read_confidence(node, "" if metric is POISON else metric.name, scope)
    if POISON in (metric, limit, profile, baseline, confidence) or _reported_invalid_limit(
        node, limit, metric.name, scope
    ):
        return None
    part, part_span = (node.part.path, node.part.span) if node.part else ("", None)
    return Bound(metric, node.op, limit, baseline, profile, part, node.span, confidence, part_span)


def _read_confidence(node: ast.Bound, metric: str, scope: Scope) -> Any:
    """Confidence as a share, None where the bound names none, or POISON."""
    if node.confidence is None:
        return None
    value = typed_value(node.confidence, Param("confidence", ("ratio",), "", of=(), ge=0.5, lt=1.0), scope)
    facts = scope.session.vocabulary.words("metric")[metric].facts if metric else {"rowwise": True}
    fault = None
    if not facts.get("rowwise"):
        reason = "reads a clock, and is decided by an interval anyway" if facts.get("timed") else "has no rows"
        message, help_text = f"`{metric}` {reason}", f"leave `with {node.confidence.span.text} confidence` out"
        fault = invalid_bound(message, node.confidence.span, help=help_text)
    elif node.op in ("==", "in"):
        message = f"`{node.op}` bounds two sides, and rows decide one"
        fault = invalid_bound(message, node.confidence.span, help="write a bound with `<=`, and one with `>=`")
    if fault is not None:
        scope.report(fault)
    return POISON if fault is not None or value is POISON else _factor_as_float(value)


def _name_of_declared_entry(name: ast.Name, kind: str, scope: Scope) -> Any:
    """The name of a declared model or profile, or POISON."""
    entry = scope.resolve_name(name.path)
    if entry is None:
        scope.report_unknown_name(name, (kind,), noun=kind)
        return POISON
    if entry.kind != kind:
        scope.report(kind_mismatch_diagnostic(name, entry, f", a {kind} is needed"))
        return POISON
    return scope.variant.add_module_entry(entry)


def _read_limit(node: ast.Bound, unit: str, scope: Scope, is_known_metric: bool) -> Any:
    """The limit in the metric's unit: a factor where there is a baseline, a range for `in`."""
    if not is_known_metric:
        _mark_names_as_used(node.limit.amount, scope)
        return POISON
    types = ("float", "ratio") if node.limit.baseline else limit_types_of_unit(unit)
    ranged = isinstance(node.limit.amount, ast.Interval)
    if ranged != (node.op == "in"):
        span = node.limit.amount.span
        scope.report(
            invalid_bound("`in` is followed by a range", span, help="write `in 0.8B..1.0B`")
            if not ranged
            else invalid_bound(
                f"`{node.op}` is followed by one value, this is a range", span, help=f"write `in {span.text}`"
            )
        )
        return POISON
    param = Param(_metric_label(node), types, "", of=())
    if isinstance(node.limit.amount, ast.Number) and node.limit.amount.unit == "%" and "ratio" not in types:
        scope.report(_share_without_baseline_diagnostic(node, node.limit.amount, param, scope))
        return POISON
    if ranged:
        limits = [typed_value(e, param, scope) for e in (node.limit.amount.low, node.limit.amount.high)]
        return POISON if POISON in limits else Range(*map(_factor_as_float, limits) if node.limit.baseline else limits)
    value = typed_value(node.limit.amount, param, scope)
    return _factor_as_float(value) if node.limit.baseline and value is not POISON else value


def _share_without_baseline_diagnostic(node: ast.Bound, amount: ast.Number, param: Param, scope: Scope) -> Diagnostic:
    """Diagnostic of `perplexity <= 102%`, and of `1.02%`, which was meant as the factor 1.02."""
    share, digits = literal_value(amount).value, float(amount.digits)
    factor = shortest_decimal(digits if 1 <= digits <= _MAX_BOUNDS else share)
    return unit_mismatch(
        f"`{param.name}` is {amount.span.text}, {expected_phrase(param)} is needed",
        amount.span,
        help=f"write `{param.name} {node.op} {factor} * {_baseline_name(scope)}` for a share of the original's",
    )


def _baseline_name(scope: Scope) -> str:
    return next((name for name, entry in scope.entries_by_usable_name().items() if entry.kind == "model"), "base")


_MIN_SAMPLES = 100  # a count of which no model has so few
_MAX_BOUNDS = 2  # times what the original has: more is surely no share


def _reported_invalid_limit(node: ast.Bound, limit: Any, metric: str, scope: Scope) -> bool:
    """Whether a limit is reported as none: no part of the baseline, or a factor that lacks its baseline."""
    if isinstance(limit, Range) or not isinstance(limit, (int, float)):
        return False
    span, label = node.limit.amount.span, _metric_label(node)
    if node.limit.baseline:
        if limit > 0:
            return False
        fault = invalid_bound(
            f"{span.text} of what `{node.limit.baseline.path}` has is nothing, and no bound",
            span,
            help="write a factor above 0, or a plain value without a baseline",
        )
    else:
        facts = scope.session.vocabulary.words("metric")[metric].facts
        if not facts.get("exact") or limit >= _MIN_SAMPLES:
            return False
        is_share = 0 < limit <= _MAX_BOUNDS
        factor = span.text if is_share else "0.8"
        share = f"`{label} {node.op} {factor} * {_baseline_name(scope)}` for a share of the original's"
        fault = invalid_bound(
            f"`{label}` is a count, and no model has as few as {span.text}",
            span,
            help=f"write {share}" if is_share else f"write a count, as in `{label} {node.op} 125M`, or {share}",
        )
    scope.report(fault)
    return True


def _mark_names_as_used(expr: ast.Expr, scope: Scope) -> None:
    from .calls import names_in_expression

    for name in names_in_expression(expr):
        scope.resolve_name(name.path)


def _metric_label(node: ast.Bound) -> str:
    return node.metric.path if isinstance(node.metric, ast.Name) else node.metric.name.path


def _factor_as_float(value: Any) -> float:
    return value.value if isinstance(value, Ratio) else value


def limit_types_of_unit(unit: str) -> tuple[str, ...]:
    """The types that a limit of a metric may have."""
    if unit in _SIZES:
        return ("bytes",)
    if unit in _TIMES:
        return ("duration",)
    return ("float", "ratio") if unit in ("%", "ratio", "share") else ("float",)


def check_emit_calls(pipeline: ast.Pipeline, calls: tuple[ast.Call, ...], build: PipelineBuild) -> list[Emit]:
    """Checked targets, each with the step whose result it holds."""
    out = []
    for call in calls:
        word, target = check_plugin_call("target", call, build.scope)
        source: str | None = build.stages[-1].name if build.stages else build.input
        if arg := next((a for a in call.args if a.name == "from"), None):
            source = resolve_from_argument(arg, build.scope, pipeline, build.input)
        if word and target and source is not None:
            out.append(Emit(target, source))
            report_unholdable_result(word, out[-1], build)
            _report_effects_target_cannot_hold(word, out[-1], build)
    return out


def _report_effects_target_cannot_hold(plugin: Word, emit: Emit, build: PipelineBuild) -> None:
    """A target says what it can't hold, a pass what it makes: the two meet here."""
    reasons = plugin.rules(emit.call.args).cannot_hold()
    for stage in build.source_chain_of(emit.source):
        for effect in stage.rules.effects():
            if effect in reasons:
                build.scope.report(
                    cannot_hold(
                        f"`{plugin.name}` can't hold the {effect} that `{stage.name}` makes",
                        emit.call.span,
                        note=reasons[effect],
                        related=((stage.span, effect),),
                    )
                )
                return


def report_unmeasured_effects(bounds: Iterable[Bound], build: PipelineBuild) -> None:
    """Warn of bounds on metrics whose value an effect of a pass can't change."""
    for bound in bounds:
        word = build.scope.session.vocabulary.words("metric")[bound.metric.name]
        reasons = word.rules(dict(bound.metric.args)).cannot_measure()
        for stage in build.source_chain_of(bound.part) or build.stages:
            for effect in (e for e in stage.rules.effects() if e in reasons):
                build.scope.report(
                    unmeasured(
                        f"`{word.name}` leaves out the {effect} that `{stage.name}` makes",
                        bound.span,
                        note=reasons[effect],
                        related=((stage.span, effect),),
                    )
                )


def report_invalid_artifact_paths(emits: list[Emit], scope: Scope) -> None:
    """Report artifact paths outside the output folder, or inside another artifact's."""
    spans: dict[tuple[str, ...], Span | None] = {}
    for emit in emits:
        path, span = emit.call.args.get("path", ""), emit.call.argument_or_call_span("path")
        if fault := _output_path_problem(path):
            scope.report(invalid_path(fault, span, help='write a path inside the output folder: "hf"'))
            continue
        parts = tuple(p for p in path.split("/") if p not in ("", "."))
        for other, other_span in spans.items():
            shared = min(len(parts), len(other))
            if parts[:shared] == other[:shared]:
                message = "is written twice" if parts == other else f"and {'/'.join(other)} lie inside one another"
                scope.report(
                    path_clash(
                        f"{path} {message}",
                        span,
                        related=((other_span, "the first"),) if other_span else (),
                        help="give each artifact a path of its own",
                    )
                )
                break
        else:
            spans[parts] = span


_LONGEST = 200  # bytes of a name: systems have 255, and a draft's name is longer


def _output_path_problem(path: str) -> str:
    """Why a path is none inside the output folder, or ""."""
    parts = [p for p in path.split("/") if p not in ("", ".")]
    if not parts:
        return "the path is empty"
    if path.startswith(("/", "~")) or "\\" in path or path[1:2] == ":":
        return f"{path} is not relative to the output folder"
    if any(len(part.encode()) > _LONGEST for part in parts):
        return f"a name of the path has more than {_LONGEST} bytes"
    return f"{path} leads out of the output folder" if ".." in parts else ""
