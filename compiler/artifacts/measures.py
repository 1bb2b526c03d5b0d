"""Measures of an artifact by metric, which print as a table."""

from typing import NamedTuple

from ..core.quantity import change_text, measurement_text
from .manifest import Measure


class MeasureCells(NamedTuple):
    """A measure as text, in the columns of the table."""

    metric: str
    original: str
    compiled: str
    change: str


class Measures(dict[str, Measure]):
    """Measures beside the original's, by the metric as the recipe writes it."""

    def __repr__(self) -> str:
        rows = [MeasureCells._fields, *map(_measure_cells, self.values())]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def _measure_cells(measure: Measure) -> MeasureCells:
    original, compiled = (
        "" if value is None else measurement_text(value, measure.unit) for value in (measure.original, measure.compiled)
    )
    change = ""
    if measure.original and measure.compiled is not None:
        change = change_text(measure.original, measure.compiled)
    return MeasureCells(measure.metric, original, compiled or measure.untimed, change)
