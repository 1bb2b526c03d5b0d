"""Table of losses: equal tokens through the original, the program in memory and each form."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..form_losses import account_rows, merge_accounts
from .report_data import ReportData, one_line_or_empty


@dataclass(frozen=True)
class Row:
    """`shares` are of the largest divergence: what there is, and what of it the program in memory has too."""

    what: str
    cells: tuple[str, ...]
    shares: tuple[float, float]


def divergence_table_rows(reports: Sequence[ReportData]) -> list[Row]:
    losses = merge_accounts(
        {report.location: report.manifest.accounts for report in reports if report.manifest.accounts}
    )
    if not losses:
        return []
    largest = max([row.divergence or 0.0 for row in losses]) or 1.0
    program, rows = 0.0, []
    for row, (_, *cells) in zip(losses, account_rows(losses)[1:], strict=True):
        if row.drift is None:
            program = row.divergence or 0.0
        total_loss = row.divergence or 0.0
        rows.append(
            Row(one_line_or_empty(row.what), tuple(cells), (total_loss / largest, min(total_loss, program) / largest))
        )
    return rows
