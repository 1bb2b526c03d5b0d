"""Share of zeros in each module's weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from .chart import FIELD_LABELS, Chart, axis, dot, hue, render_chart
from .sheet import number, table, word

MAX_ROWS = 2000


def zero_share_chart(decisions: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Chart of the share of zeros of each module; None where nothing was made zero."""
    shares = next((table(d[name]) for d in decisions for name in ("zeros", "quantized") if table(d.get(name))), {})
    read = [(word(path), number(value)) for path, value in list(shares.items())[:MAX_ROWS]]
    module_shares = [(path, share) for path, share in read if share is not None]
    if len(module_shares) < 2 or not any(share for _, share in module_shares):
        return None
    values: list[dict[str, Any]] = [
        {"at": i, "share": 100 * share, "kind": path.rpartition(".")[2], "says": f"{path}: {share:.1%} zero"}
        for i, (path, share) in enumerate(module_shares)
    ]
    spec = {
        "data": {"values": values},
        "mark": dot(45),
        "encoding": {
            "x": axis("at", "modules, from the first layer to the last", axis={"labels": False}),
            "y": axis("share", "zeros, %", scale={"domain": [0, 100]}),
            "color": hue([v["kind"] for v in values]),
            "description": FIELD_LABELS,
        },
    }
    low, high = min(share for _, share in module_shares), max(share for _, share in module_shares)
    description = f"Share of zeros in {len(module_shares)} modules, between {low:.0%} and {high:.0%}."
    listed = [(path, f"{share:.1%}") for path, share in module_shares]
    return render_chart("Zeros in each module", description, spec, ("module", "zeros"), listed)
