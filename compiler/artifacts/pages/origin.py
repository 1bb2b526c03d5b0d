"""Origin of an artifact: versions, machine, hashes, sizes, and what each step took."""

from dataclasses import dataclass, replace
from typing import Any

from ...core.quantity import change_text, count_text, interval_text, measurement_text, size_text
from ..manifest import Check, Measure
from .report_data import ReportData, finite_number_or_none, list_or_empty, mapping_or_empty, one_line_or_empty

FILES = 500
TIMED = ("ms", "tokens/s")  # units of what a clock measures, whose arguments name no rows


@dataclass(frozen=True)
class StageUsage:
    """A step's time and memory beside what `plan` said; shares are of the longest."""

    name: str
    planned: str
    seconds: str
    planned_share: float
    time_share: float
    peak: str


def origin_facts(report: ReportData) -> list[tuple[str, str]]:
    """Name and value, those that are known."""
    manifest = report.manifest
    lock, machine = manifest.lock, manifest.machine
    versions = {"effc": manifest.effc, **mapping_or_empty(lock.get("versions"))}
    memory = finite_number_or_none(machine.get("memory_bytes"))
    entries = [
        ("Compiled", one_line_or_empty(manifest.run.get("created")).replace("T", " ").replace("+00:00", " UTC")),
        (
            "Recipe",
            " ".join(
                filter(
                    None,
                    (one_line_or_empty(manifest.recipe.get("name")), one_line_or_empty(manifest.recipe.get("variant"))),
                )
            ),
        ),
        ("Versions", ", ".join(f"{name} {one_line_or_empty(v)}" for name, v in versions.items() if v)),
        (
            "Processor",
            ", ".join(filter(None, (one_line_or_empty(machine.get("cpu")), one_line_or_empty(machine.get("isa"))))),
        ),
        (
            "Machine",
            ", ".join(
                filter(None, (one_line_or_empty(machine.get("os")), size_text(memory) + " of memory" if memory else ""))
            ),
        ),
        ("Python", one_line_or_empty(machine.get("python"))),
        ("Threads", _plain_value_text(lock.get("threads"))),
        ("Device", one_line_or_empty(lock.get("device"))),
        ("Seed", _plain_value_text(lock.get("seed"))),
        (
            "Parameters",
            ", ".join(
                f"{n} = {_plain_value_text(v)}" for n, v in mapping_or_empty(manifest.recipe.get("params")).items()
            ),
        ),
        (
            "Size on disk",
            f"{size_text(manifest.bytes)} in {count_text(len(manifest.files), 'file')}" if manifest.files else "",
        ),
    ]
    return [(name, value) for name, value in entries if value]


def label_and_hash_of_inputs(report: ReportData) -> list[tuple[str, str]]:
    """Hashes of the artifact and of all its inputs."""
    artifact_hash = [("artifact", report.hash)] if report.hash else []
    return artifact_hash + [
        (one_line_or_empty(label), one_line_or_empty(identity))
        for label, identity in report.manifest.lock.get("inputs", {}).items()
    ]


def name_size_and_sha256_of_files(report: ReportData) -> list[tuple[str, str, str]]:
    return [
        (one_line_or_empty(name), size_text(bytes_), one_line_or_empty(sha))
        for name, (bytes_, sha) in list(report.manifest.files.items())[:FILES]
    ]


def stage_time_and_memory(report: ReportData) -> list[StageUsage]:
    stages = []
    for step in map(mapping_or_empty, list_or_empty(report.manifest.run.get("steps"))[:FILES]):
        planned, elapsed, peak = (
            finite_number_or_none(step.get(name)) for name in ("planned", "seconds", "peak_bytes")
        )
        stages.append((one_line_or_empty(step.get("name")), planned, elapsed, peak, step.get("cached") is True))
    measuring = finite_number_or_none(mapping_or_empty(report.manifest.run.get("seconds")).get("measure"))
    if measuring is not None:
        stages.append(("measuring", None, measuring, None, False))
    longest = max([v for _, planned, elapsed, *_ in stages for v in (planned, elapsed) if v], default=1.0)
    return [
        StageUsage(
            name,
            measurement_text(planned, "s") if planned else "",
            "from the cache" if cached else measurement_text(elapsed, "s") if elapsed is not None else "",
            (planned or 0.0) / longest,
            (elapsed or 0.0) / longest,
            size_text(peak) if peak else "",
        )
        for name, planned, elapsed, peak, cached in stages
    ]


@dataclass(frozen=True)
class ReopenedForm:
    """A form of the artifact, and how far its outputs were from those in memory."""

    form: str
    outputs: int
    worst: str
    allowed: str
    share: float  # of what is allowed
    reasons: tuple[str, ...]


def worst_check_by_form(checks: tuple[Check, ...]) -> list[ReopenedForm]:
    forms: dict[str, list[Check]] = {}
    for check in checks:
        forms.setdefault(one_line_or_empty(check.what.partition(",")[0]), []).append(check)
    result = []
    for form, form_checks in forms.items():
        worst = max(form_checks, key=lambda c: (c.worst or 0.0) / c.tolerance if c.tolerance else 0.0)
        share = (worst.worst or 0.0) / worst.tolerance if worst.tolerance else 0.0
        reasons = tuple(dict.fromkeys(one_line_or_empty(c.reason) for c in form_checks if c.reason))
        result.append(
            ReopenedForm(
                form,
                len(form_checks),
                f"{worst.worst or 0.0:.2g}",
                f"{worst.tolerance or 0.0:.2g}",
                min(share, 1.0),
                reasons,
            )
        )
    return result


@dataclass(frozen=True)
class Row:
    """A measure with its bounds: (text, limit, outcome, note)."""

    metric: str
    before: str
    after: str
    change: str
    good: str  # "better", "worse" or ""
    spread: str
    bounds: tuple[tuple[str, str, str, str], ...]
    shares: tuple[float, float] = (0.0, 0.0)  # of the larger of both


def measure_table_rows(report: ReportData) -> list[Row]:
    result, left = [], list(report.manifest.expectations)
    for m in report.manifest.measures:
        bounds_of = [e for e in left if e.text.startswith(f"{m.metric} ")]
        left = [e for e in left if e not in bounds_of]
        before, after = finite_number_or_none(m.original), finite_number_or_none(m.compiled)
        bounds = tuple(
            (e.text.removeprefix(m.metric).strip(), e.limit, e.outcome, one_line_or_empty(e.note)) for e in bounds_of
        )
        scale = max(abs(before or 0.0), abs(after or 0.0)) or 1.0
        result.append(
            Row(
                one_line_or_empty(m.metric),
                measurement_text(before, m.unit) if before is not None else "",
                measurement_text(after, m.unit) if after is not None else one_line_or_empty(m.untimed),
                change_text(before, after).replace("-", "−") if before is not None and after is not None else "",
                _better_or_worse(before, after, m.better) if _is_significant(m) else "",
                _uncertainty_range_text(m),
                bounds,
                (abs(before or 0.0) / scale, abs(after or 0.0) / scale),
            )
        )
    return result + [
        Row(
            one_line_or_empty(e.text),
            "",
            _plain_value_text(e.value),
            "",
            "",
            "",
            (("", e.limit, e.outcome, one_line_or_empty(e.note)),),
        )
        for e in left
    ]


def perplexity_row(report: ReportData) -> Row | None:
    """Perplexity of the original and of the last form on the few tokens that went through both; None where there is
    none, or where a measure is on rows of data."""
    known = [account for account in report.manifest.accounts if account.perplexity is not None]
    on_rows = any("(" in m.metric and m.unit not in TIMED for m in report.manifest.measures)
    if len(known) < 2 or on_rows:
        return None
    name = f"perplexity of {one_line_or_empty(known[0].where)}"
    few = Measure(name, "", known[0].perplexity, known[-1].perplexity)
    (row,) = measure_table_rows(replace(report, manifest=replace(report.manifest, measures=(few,), expectations=())))
    return row


def _is_significant(measure: Measure) -> bool:
    """Whether rounds, and rows of data, leave no doubt which of both models is better."""
    ranges = [measure.spread, measure.interval if measure.ratio is not None else None]
    return not any(ends and ends[0] < 1 < ends[1] for ends in ranges)


def _uncertainty_range_text(measure: Measure) -> str:
    """Range of the ratio over rounds, or its interval over rows of data."""
    if measure.spread:
        return " to ".join(change_text(1.0, end).replace("-", "−") for end in measure.spread)
    if measure.interval and measure.ratio is not None:
        return interval_text(measure.ratio, measure.interval)
    if measure.interval and measure.compiled is not None:
        return interval_text(measure.compiled, measure.interval)
    return ""


def _better_or_worse(before: float | None, after: float | None, better: str) -> str:
    if before is None or after is None or before == after:
        return ""
    return "better" if (after < before) == (better == "lower") else "worse"


def _plain_value_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return one_line_or_empty(value) if isinstance(value, str) else one_line_or_empty(str(value))
