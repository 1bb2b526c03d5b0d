"""The steps of the recipe: what each says of itself, and charts of how it decided."""

from dataclasses import dataclass

from ...core.warned import warning_sentence
from ..manifest import Manifest
from .chart import Chart
from .cuts import score_after_cuts_chart
from .losses import training_losses_chart
from .modules import quantization_error_chart, zero_share_chart
from .report_data import list_or_empty, mapping_or_empty, one_line_or_empty

CHANGES = 400


@dataclass(frozen=True)
class ReportStep:
    name: str
    word: str
    summary: str
    warnings: tuple[str, ...]
    charts: tuple[Chart, ...]
    changes: tuple[str, ...]


def step_report_sections(manifest: Manifest) -> list[ReportStep]:
    result = []
    for step in manifest.steps:
        decisions = [mapping_or_empty(d) for d in list_or_empty(step.get("decisions"))]
        charts = [
            chart
            for draw in (score_after_cuts_chart, training_losses_chart, zero_share_chart, quantization_error_chart)
            if (chart := draw(decisions))
        ]
        changes = tuple(one_line_or_empty(change) for change in list_or_empty(step.get("changes"))[:CHANGES])
        name, word_name, summary = (one_line_or_empty(step.get(key)) for key in ("name", "word", "summary"))
        warnings = tuple(
            warning_sentence(mapping_or_empty(warning)) for warning in list_or_empty(step.get("warnings"))[:CHANGES]
        )
        result.append(ReportStep(name, word_name, summary, warnings, tuple(charts), changes))
    return result
