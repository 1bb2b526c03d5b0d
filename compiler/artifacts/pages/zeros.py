"""How much of each module's weights is zero."""

from collections.abc import Mapping, Sequence
from typing import Any

from .chart import SAYS, Chart, axis, chart, dot, hue
from .sheet import number, table, word

MOST = 2000


def zeros(decisions: Sequence[Mapping[str, Any]]) -> Chart | None:
    """None where nothing was made zero."""
    shares = next((table(d[name]) for d in decisions for name in ("zeros", "quantized") if table(d.get(name))), {})
    read = [(word(path), number(value)) for path, value in list(shares.items())[:MOST]]
    found = [(path, share) for path, share in read if share is not None]
    if len(found) < 2 or not any(share for _, share in found):
        return None
    values: list[dict[str, Any]] = [
        {"at": i, "share": 100 * share, "kind": path.rpartition(".")[2], "says": f"{path}: {share:.1%} zero"}
        for i, (path, share) in enumerate(found)
    ]
    spec = {
        "data": {"values": values},
        "mark": dot(45),
        "encoding": {
            "x": axis("at", "modules, from the first layer to the last", axis={"labels": False}),
            "y": axis("share", "zeros, %", scale={"domain": [0, 100]}),
            "color": hue([v["kind"] for v in values]),
            "description": SAYS,
        },
    }
    low, high = min(share for _, share in found), max(share for _, share in found)
    says = f"Share of zeros in {len(found)} modules, between {low:.0%} and {high:.0%}."
    listed = [(path, f"{share:.1%}") for path, share in found]
    return chart("Zeros in each module", says, spec, ("module", "zeros"), listed)
