"""Table that compares results: a row for each artifact, of whatever pipelines and variants."""

from collections.abc import Sequence
from pathlib import Path

from ..core.quantity import count_text, measurement_text
from .manifest import NAME, Expectation, Measure
from .pages.report_data import ReportData, finite_number_or_none, one_line_or_empty

_FIRST, _LAST = ("params", "bytes"), ("prefill", "decode", "throughput")  # sizes, quality, speed
_OUTCOMES = {"fails": ("fails", "fail"), "undecided": ("undecided",) * 2, "skipped": ("skipped",) * 2}


def artifacts_in(folder: Path) -> list[Path]:
    """Artifacts of an output folder, those of variants too; the folder itself where it is one, or holds none."""
    if (folder / NAME).is_file():
        return [folder]
    files = (*folder.glob(f"[!.]*/{NAME}"), *folder.glob(f"[!.]*/[!.]*/{NAME}"))
    return sorted(file.parent for file in files) or [folder]


def pipeline_and_variant_label(report: ReportData) -> str:
    """Name of an artifact among those of other variants and pipelines."""
    variant = one_line_or_empty(report.manifest.recipe.get("variant"))
    return (
        f"{one_line_or_empty(report.manifest.name)} [{variant}]" if variant else one_line_or_empty(report.manifest.name)
    )


def results_table(reports: Sequence[ReportData]) -> list[tuple[str, ...]]:
    """Rows of cells, the head first: pipeline, artifact, target, each measure, bounds."""
    measures = [{one_line_or_empty(m.metric): m for m in report.manifest.measures} for report in reports]
    metrics = sorted(dict.fromkeys(name for row in measures for name in row), key=_metric_sort_rank)
    originals = [_common_original_text([row[name] for row in measures if name in row]) for name in metrics]
    return [
        ("pipeline", "artifact", "target", *metrics, "bounds"),
        ("original", "", "", *originals, ""),
        *(
            (
                pipeline_and_variant_label(report),
                one_line_or_empty(report.location),
                one_line_or_empty(report.manifest.kind),
                *(_compiled_value_text(row.get(name)) for name in metrics),
                bounds_text(report.manifest.expectations),
            )
            for report, row in zip(reports, measures, strict=True)
        ),
    ]


def bounds_text(expectations: Sequence[Expectation]) -> str:
    """`3 hold`, `1 of 3 fails`; "" where nothing was expected."""
    outcomes = [e.outcome for e in expectations]
    for name, (one, many) in _OUTCOMES.items():
        if count := outcomes.count(name):
            return f"{count} of {len(outcomes)} {one if count == 1 else many}"
    return f"{len(outcomes)} hold{'s' * (len(outcomes) == 1)}" if outcomes else ""


def results_title(reports: Sequence[ReportData]) -> str:
    """`4 artifacts of 2 results`."""
    results = len({report.pipeline for report in reports})
    return f"{count_text(len(reports), 'artifact')} of {count_text(results, 'result')}"


def _metric_sort_rank(metric: str) -> int:
    if metric in _FIRST:
        return _FIRST.index(metric)
    return 3 if metric.startswith(_LAST) else 2


def _compiled_value_text(measure: Measure | None) -> str:
    if measure is None:
        return ""
    value = finite_number_or_none(measure.compiled)
    return measurement_text(value, measure.unit) if value is not None else "not timed" if measure.untimed else ""


def _common_original_text(measures: Sequence[Measure]) -> str:
    """Value of the original, where all tell the same."""
    texts = {measurement_text(v, m.unit) for m in measures if (v := finite_number_or_none(m.original)) is not None}
    return texts.pop() if len(texts) == 1 else ""
