"""Whether `keep:` and `remove:` mean something possible: legal head counts, widths, layers that remain."""

from math import ceil
from typing import TYPE_CHECKING, Any

from ..syntax.diagnostics import Diagnostic, Fault, Fix
from ..syntax.source import Span
from .pipelines import PipelineBuild, Stage
from .skeleton import Group
from .value_text import percent_text, plain_value_text, shortest_decimal, value_text
from .values import Ratio

if TYPE_CHECKING:
    from .structure import Selectable

illegal_head_count = Fault("illegal-head-count", "A number of heads can't be shared out equally among the KV heads.")
unaligned_width = Fault("unaligned-width", "A width can't be a multiple of `align`, or keeps less than one step of it.")
leaves_none = Fault("leaves-none", "A pass is told to remove all that there is, or more.")
needs_score = Fault("needs-score", "An amount of the whole model is to be met and no score says where to cut.")
no_effect = Fault("no-effect", "A step would change nothing.")

_AT = {"keep": "keep at least", "remove": "remove at most", "sparsity": "zero at most"}
_ITEMS = {"ssm_heads": "heads", "ssm_channels": "channels", "ssm_state": "states"}
MODEL_QUANTITIES = ("params", "weights", "flops", "bytes", "latency")  # bases that the structure says nothing of


def report_invalid_amount(
    stage: Stage, kind: str, selectable: "Selectable", selected: "Selectable", build: PipelineBuild
) -> None:
    """Report an amount of a step that is impossible or changes nothing."""
    amount = _amount_argument_of_step(stage)
    if amount is None:
        return
    name, value = amount
    if type(value) is int and stage.word.param(name).unit == "cuts":
        return  # of parts of whatever kind: there are more than of one
    if isinstance(value, Ratio) and value.value == (1 if name == "keep" else 0):
        build.report(
            stage,
            no_effect(
                f"`{name}: {value_text(value)}` changes nothing",
                stage.call.argument_or_call_span(name),
                help="drop the step, or keep less",
            ),
        )
    elif (
        isinstance(value, Ratio)
        and value.of in MODEL_QUANTITIES
        and kind in _ITEMS
        and not _allocates_across_layers(stage)
    ):
        build.report(
            stage,
            needs_score(
                f"`{name}: {value_text(value)}` is a share of the whole model, and nothing says which layers lose more",
                stage.call.argument_or_call_span(name),
                help="add `score: perplexity(...)`, or keep a share of the items",
            ),
        )
    elif (isinstance(value, Ratio) and value.of in MODEL_QUANTITIES) or _may_be_changed_by_earlier_step(
        stage, kind, build
    ):
        return
    elif kind in ("branches", "layers", "ssm", "scans"):
        _report_invalid_layer_amount(stage, name, value, selectable, selected, build)
    elif kind in ("channels", "width"):
        _report_invalid_width_amount(stage, name, value, selected, build)
    elif kind in _ITEMS:
        _report_invalid_item_amount(stage, kind, name, value, selected, build)
    elif kind in ("heads", "kv_heads") and not _allocates_across_layers(stage):
        _report_invalid_head_amount(stage, name, value, selected, build)


def _report_invalid_item_amount(
    stage: Stage, item_kind: str, argument_name: str, value: Any, selected: "Selectable", build: PipelineBuild
) -> None:
    """Heads, channels or states of scans: every group of B and C keeps at least one step."""
    noun, span = _ITEMS[item_kind], stage.call.argument_or_call_span(argument_name)
    step = next((n for n in map(stage.call.args.get, ("step", "align")) if type(n) is int), 1)
    if _allocates_across_layers(stage):
        sizes = [
            (sum(g.per_block or g.count for g in selected.groups), step * len(selected.groups), "all mixers together")
        ]
    else:
        sizes = [(g.per_block or g.count, step, f"`{g.site}`") for g in selected.groups]
    for size, least, where in sizes:
        target = _unrounded_remaining_count(argument_name, value, size)
        if target < min(least, size) * (1 - 1e-9):
            build.report(
                stage,
                leaves_none(
                    f"`{argument_name}: {value_text(value)}` leaves {_rounded_count_text(target)} of {size} {noun} "
                    f"of {where}",
                    span,
                    help=f"{_AT[argument_name]} {_least_share_text(argument_name, min(least, size), size)}"
                    + (", or cut in smaller steps" if step > 1 else ""),
                ),
            )
            return
    if sizes and all(
        _round_to_multiple(_unrounded_remaining_count(argument_name, value, size), step, size) >= size
        for size, _, _ in sizes
    ):
        build.report(
            stage,
            no_effect(
                f"`{argument_name}: {value_text(value)}` in steps of {step} rounds to all {sizes[0][0]} {noun}",
                span,
                help="keep less, or cut in smaller steps",
            ),
        )


def _amount_argument_of_step(stage: Stage) -> tuple[str, Any] | None:
    """The amount that a step names: (parameter, value)."""
    for name in ("keep", "remove", "sparsity"):
        value = stage.call.args.get(name)
        if isinstance(value, Ratio) or type(value) is int:
            return name, value
    return None


def _may_be_changed_by_earlier_step(stage: Stage, kind: str, build: PipelineBuild) -> bool:
    """Whether an earlier step has changed how many of these there are, or may have, or was not understood."""
    same = {
        "heads": {"heads", "kv_heads"},
        "kv_heads": {"heads", "kv_heads"},
        "layers": {"layers", "branches"},
        "branches": {"layers", "branches"},
    }.get(kind, {kind})
    return any(
        s.word is None
        or not s.word.facts.get("foreseeable", True)
        or (s.word.facts.get("acts_on") in same and _amount_argument_of_step(s))
        for s in build.source_chain_of(stage.name)[:-1]
    )


def _allocates_across_layers(stage: Stage) -> bool:
    """Whether layers compete, so that only their sum is told: the pass says that it makes uneven sizes."""
    return any(effect.startswith("uneven") for effect in stage.rules.effects())


def _unrounded_remaining_count(amount_param: str, value: Any, count: int) -> float:
    """Number of `count` that remain, before rounding."""
    share = value.value * count if isinstance(value, Ratio) else value
    return count - share if amount_param in ("remove", "sparsity") else share


def _report_invalid_layer_amount(
    stage: Stage, name: str, value: Any, selectable: "Selectable", selected: "Selectable", build: PipelineBuild
) -> None:
    total, noun, span = len(selectable.paths), selectable.noun, stage.call.argument_or_call_span(name)
    target = _unrounded_remaining_count(name, value, total)
    removed = total - int(target + 0.5 + 1e-9)
    argument = f"`{name}: {value_text(value)}`"
    if target < 0.5:
        build.report(
            stage,
            leaves_none(
                f"{argument} leaves none of {total} {noun}",
                span,
                help=f"at least one has to stay: remove at most {total - 1}",
            ),
        )
    elif removed <= 0:
        means = (
            f" means {shortest_decimal(round(total - target, 2))} of {total} {noun}, which" if name == "remove" else ""
        )
        build.report(stage, no_effect(f"{argument}{means} changes nothing", span, help="drop the step, or remove more"))
    elif removed > len(selected.paths):
        build.report(
            stage,
            leaves_none(
                f"{argument} removes {removed}, `on` selects {len(selected.paths)} {noun}",
                span,
                related=((on, f"{len(selected.paths)} of {total}"),)
                if (on := stage.call.argument_or_call_span("on"))
                else (),
                help="remove fewer, or select more",
            ),
        )


def _report_invalid_width_amount(
    stage: Stage, name: str, value: Any, selected: "Selectable", build: PipelineBuild
) -> None:
    align = stage.call.args.get("align")
    align = align if type(align) is int else 1
    span = stage.call.argument_or_call_span(name)
    for group in selected.groups:
        if align > group.count:
            build.report(
                stage,
                unaligned_width(
                    f"`align: {align}` is more than the {group.count} channels of `{group.site}`",
                    stage.call.argument_or_call_span("align"),
                    help=f"align to at most {group.count}",
                ),
            )
            return
    if not selected.groups:  # `allow empty`
        return
    report = _pooled_width_problem if _allocates_across_layers(stage) else _uniform_width_problem
    if fault := report(name, value, align, selected.groups, span):
        build.report(stage, fault)


def _uniform_width_problem(
    name: str, value: Any, align: int, groups: tuple[Group, ...], span: Span | None
) -> Diagnostic | None:
    """Problem of an amount where every layer keeps the same share; None without one."""
    for group in groups:
        target = _unrounded_remaining_count(name, value, group.count)
        if target < align * (1 - 1e-9):
            return unaligned_width(
                f"`{name}: {value_text(value)}` leaves {_rounded_count_text(target)} of {group.count} channels "
                f"of `{group.site}`, "
                f"less than one step of `align: {align}`",
                span,
                help=f"{_AT[name]} {_least_share_text(name, align, group.count)}, or align to less",
            )
    if all(
        _round_to_multiple(_unrounded_remaining_count(name, value, g.count), align, g.count) >= g.count for g in groups
    ):
        text, count = f"`{name}: {value_text(value)}`", groups[0].count
        return no_effect(
            f"{text} is less than one step of `align: {align}` below all {count} channels"
            if groups[0].kind == "width"  # these are rounded down, as the parameters are
            else f"{text} in steps of {align} rounds to all {count} channels",
            span,
            help="keep less, or align to less",
        )
    return None


def _pooled_width_problem(
    name: str, value: Any, align: int, groups: tuple[Group, ...], span: Span | None
) -> Diagnostic | None:
    """Layers compete, so only their sum is told; each keeps at least one step."""
    total = sum(g.count for g in groups)
    target, least = _unrounded_remaining_count(name, value, total), align * len(groups)
    if target < least * (1 - 1e-9):
        return unaligned_width(
            f"`{name}: {value_text(value)}` leaves {_rounded_count_text(target)} of {total} channels, less than "
            f"one step of `align: {align}` in each of {len(groups)} modules",
            span,
            help=f"{_AT[name]} {_least_share_text(name, least, total)}, or align to less",
        )
    if _round_to_multiple(target, align, total) >= total:
        return no_effect(
            f"`{name}: {value_text(value)}` in steps of {align} rounds to all {total} channels",
            span,
            help="keep less, or align to less",
        )
    return None


def _least_share_text(name: str, count: int, total: int) -> str:
    """The share that keeps `count`, with one digit after the point, and enough."""
    least = ceil(count / total * 1000) / 1000
    return percent_text(least if name == "keep" else 1 - least)


def _rounded_count_text(target: float) -> str:
    return shortest_decimal(round(target, 1))


def _round_to_multiple(target: float, align: int, count: int) -> int:
    """As `compiler/analysis/planning/amount.py` rounds: the nearest multiple of `align`, ties to more."""
    return min(max(int(target / align + 0.5 + 1e-9), 1) * align, count)


def _report_invalid_head_amount(
    stage: Stage, name: str, value: Any, selected: "Selectable", build: PipelineBuild
) -> None:
    """Under grouped-query attention each KV head must serve the same number of query heads."""
    for group in selected.groups:
        step = group.count // group.per_block if group.per_block else 1
        target = _unrounded_remaining_count(name, value, group.count)
        legal = int(target / step + 0.5) * step
        within_tolerance = abs(target - legal) <= 0.005 * group.count  # so that 83% says 10 of 12
        if within_tolerance and 0 < legal < group.count:
            continue
        if within_tolerance and legal >= group.count:
            build.report(
                stage,
                no_effect(
                    f"`{name}: {value_text(value)}` keeps all {group.count} heads of `{group.site}`",
                    stage.call.argument_or_call_span(name),
                    help="drop the step, or keep less",
                ),
            )
        else:
            build.report(stage, _illegal_heads_diagnostic(stage, name, value, group, step, target, build))
        return


def _illegal_heads_diagnostic(
    stage: Stage, name: str, value: Any, group: Group, step: int, target: float, build: PipelineBuild
) -> Diagnostic:
    low = int(target / step) * step
    counts = [c for c in (low, low + step) if 0 < c <= group.count]
    choices = [f"{c} ({percent_text(c / group.count)})" for c in counts]
    noun = "KV heads" if group.kind == "kv_heads" else "query heads" if group.per_block else "heads"
    argument = f"`{name}: {value_text(value)}`"
    served = f"with {step} KV heads of {group.per_block} " if group.per_block else ""
    many, smaller = len(counts) > 1, [c for c in counts if c < group.count]
    bases = stage.word.param(name).of
    alternative = (
        "" if not group.per_block or "kv_heads" not in bases else _kv_aligned_heads_text(target, group, step, name)
    )
    if not smaller:
        heads = f"{group.count} {noun if group.count > 1 else noun[:-1]}"
        remedy = f'leave it out by `on: "*" - "{group.site}"`, or remove whole blocks'
        return illegal_head_count(
            f"{argument} means {_rounded_count_text(target)} of {heads} of `{group.site}`, {served}which can lose none",
            stage.call.argument_or_call_span(name),
            help=f"write {alternative}" if alternative else remedy,
        )
    best = min(smaller, key=lambda c: abs(c - target))
    suggested = best if name == "keep" else group.count - best
    replacement = (
        value_text(Ratio(round(suggested / group.count, 3), value.of))
        if isinstance(value, Ratio)
        else plain_value_text(suggested)
    )
    return illegal_head_count(
        f"{argument} means {_rounded_count_text(target)} of {group.count} {noun}; {served}the legal "
        f"count{'s are' if many else ' is'} {' and '.join(choices)}",
        stage.call.argument_or_call_span(name),
        help=f"write `{replacement}`" + (f", or {alternative}" if alternative else ""),
        offer=Fix(span, replacement) if (span := stage.call.spans.get(name)) else None,
    )


def _kv_aligned_heads_text(target: float, group: Group, step: int, name: str) -> str:
    """The nearest number of query heads that removing whole KV heads leaves."""
    remaining = int(target / group.per_block + 0.5)
    if not 0 < remaining < step:
        return ""
    share = remaining / step if name == "keep" else 1 - remaining / step
    return f"`{percent_text(share)} of kv_heads` for {remaining * group.per_block} query heads"
