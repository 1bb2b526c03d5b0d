"""A share for each module: zeros of its weights, or the error of those that were quantized."""

from collections.abc import Mapping, Sequence
from typing import Any

from .chart import FIELD_LABELS, Chart, color_encoding, point_mark, quantitative_encoding, render_chart
from .report_data import finite_number_or_none, mapping_or_empty, one_line_or_empty

MAX_ROWS = 2000


def zero_share_chart(decisions: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Chart of the share of zeros of each module; None where nothing was made zero."""
    return _module_share_chart(decisions, "zeros", "Zeros in each module", "zeros", [0, 100])


def quantization_error_chart(decisions: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Chart of how far each module's weights moved, relative to their norm; None where nothing was quantized."""
    return _module_share_chart(decisions, "errors", "Error of each module's weights", "error", None)


def _module_share_chart(
    decisions: Sequence[Mapping[str, Any]], key: str, title: str, noun: str, domain: list[int] | None
) -> Chart | None:
    shares = next((mapping_or_empty(d[key]) for d in decisions if mapping_or_empty(d.get(key))), {})
    read = [(one_line_or_empty(path), finite_number_or_none(value)) for path, value in list(shares.items())[:MAX_ROWS]]
    module_shares = [(path, share) for path, share in read if share is not None]
    if len(module_shares) < 2 or not any(share for _, share in module_shares):
        return None
    values: list[dict[str, Any]] = [
        {"at": i, "share": 100 * share, "kind": path.rpartition(".")[2], "says": f"{path}: {noun} {share:.1%}"}
        for i, (path, share) in enumerate(module_shares)
    ]
    spec = {
        "data": {"values": values},
        "mark": point_mark(45),
        "encoding": {
            "x": quantitative_encoding("at", "modules, from the first layer to the last", axis={"labels": False}),
            "y": quantitative_encoding("share", f"{noun}, %", scale={"domain": domain} if domain else {}),
            "color": color_encoding([v["kind"] for v in values]),
            "description": FIELD_LABELS,
        },
    }
    low, high = min(share for _, share in module_shares), max(share for _, share in module_shares)
    description = f"{noun.capitalize()} of {len(module_shares)} modules, between {low:.1%} and {high:.1%}."
    listed = [(path, f"{share:.1%}") for path, share in module_shares]
    return render_chart(title, description, spec, ("module", noun), listed)
