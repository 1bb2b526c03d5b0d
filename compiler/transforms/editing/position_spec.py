"""Positions of a prompt that an intervention edits, in a recipe's notation: `f7+l7`."""

import re

from ....dsl.syntax.diagnostics import Fault

invalid_positions = Fault(
    "bad-positions",
    "A spec of positions is none.\n\n"
    "`f7` is the first seven tokens of a prompt, `l7` the last seven, `f7+l7` both. A prompt that is shorter than both "
    "together is divided among them.",
)

_EDGE = re.compile(r"([fl])([1-9]\d{0,5})")


def parse_first_last_counts(position_spec: str) -> tuple[int, int]:
    """Numbers of first and last positions: (7, 7) of `f7+l7`, (0, 1) of `l1`. Raises Reject (bad-positions)."""
    counts: dict[str, int] = {}
    for part in position_spec.replace(" ", "").split("+"):
        match = _EDGE.fullmatch(part)
        if match is None or match[1] in counts:
            problem = f"names `{match[1]}` twice" if match else f"has `{part}`, which is no count of tokens at an edge"
            raise invalid_positions(
                f"`{position_spec}` {problem}",
                help="write `f7+l7`: the first seven and the last seven tokens of the prompt",
            ).rejection()
        counts[match[1]] = int(match[2])
    return counts.get("f", 0), counts.get("l", 0)
