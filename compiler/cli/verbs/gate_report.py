"""Reports of `effc test` for CI: JUnit XML, and Markdown for a job summary or a pull request."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ....dsl.checker.value_text import bound_text
from ....dsl.syntax.render import sanitize_for_terminal, without_line_breaks

if TYPE_CHECKING:
    from ...driver.judging.baseline import Drift
    from ...driver.judging.gate import BoundVerdict
    from ...driver.judging.retest import Tested

BAR = "¦"  # in place of what ends a cell, which readers of Markdown let escape in different ways
FAILS = ("missed", "undecided", "worse")


def verdict_value_text(verdict: "BoundVerdict") -> str:
    """The value, the original's, and their ratio with its interval: `5.1 against 4.3, 1.19 (1.12 to 1.25)`."""
    from ...core.quantity import interval_text, measurement_text

    if verdict.value is None:
        return "not measured"
    text, read = measurement_text(verdict.value, verdict.unit), ""
    if verdict.bound.confidence is not None:
        read = f", {verdict.rows}"
    if verdict.original is None:
        sure = f"{interval_text(verdict.value, verdict.interval)} {verdict.unit}".rstrip() if verdict.interval else text
        return sure + read
    text += f" against {measurement_text(verdict.original, verdict.unit)}"
    if not (verdict.interval and verdict.original):
        return text + read
    value, low, high = (end / verdict.original for end in (verdict.value, *verdict.interval))
    return f"{text}, {interval_text(value, (low, high))}{read}"


def drift_limit_text(drift: "Drift") -> str:
    from ...core.quantity import measurement_text

    return "" if drift.limit is None else measurement_text(drift.limit, drift.unit)


def results_json(results: "Sequence[Tested]") -> list[dict[str, Any]]:
    return [
        {
            "path": str(r.path),
            "pipeline": r.pipeline,
            "bounds": [o.to_json() for o in r.outcomes],
            "baseline": [d.to_json() for d in r.drifts],
        }
        for r in results
    ]


def markdown_report(results: "Sequence[Tested]") -> str:
    """A table of the bounds, and one of what moved since the baseline."""
    lines = []
    for r in results:
        lines += [
            f"### {r.pipeline} ({_markdown_code(str(r.path))})",
            "",
            "| bound | measured | limit | |",
            "|---|---|---|---|",
        ]
        lines += [
            _markdown_row(bound_text(o.bound), verdict_value_text(o), str(o.limit), _state_text(o)) for o in r.outcomes
        ]
        if r.drifts:
            lines += ["", "| measure | now against the baseline | at worst | |", "|---|---|---|---|"]
            lines += [_markdown_row(d.metric, d.text(), drift_limit_text(d), d.state) for d in r.drifts]
        lines.append("")
    return "\n".join(lines).rstrip("\n")


def _markdown_row(name: str, value: str, limit: str, state: str) -> str:
    """Of a table: recipes and baselines of anybody say what is in it, and put neither cells nor links there."""
    cells = (
        _markdown_code(name),
        _escape_markdown(value),
        _escape_markdown(limit),
        (f"**{state}**" if state.partition(",")[0] in FAILS else state),
    )
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"


def _markdown_code(text: str) -> str:
    text = sanitize_for_terminal(without_line_breaks(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    gap = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{gap}{text}{gap}{fence}"


def _escape_markdown(text: str) -> str:
    return re.sub(r"[\\`*_\[\]<>~]", r"\\\g<0>", sanitize_for_terminal(without_line_breaks(text)))


def _state_text(verdict: "BoundVerdict") -> str:
    return f"{verdict.state}, not certain" if verdict.uncertainty_reason else verdict.state


def junit_report(results: "Sequence[Tested]") -> str:
    """One test case per bound, and one per measure of the baseline."""
    from xml.etree import ElementTree as xml

    states = {id(r): [*(o.state for o in r.outcomes), *(d.state for d in r.drifts)] for r in results}
    all_states = [state for suite_states in states.values() for state in suite_states]
    top = xml.Element(
        "testsuites", name="effc test", tests=str(len(all_states)), failures=str(sum(s in FAILS for s in all_states))
    )
    for r in results:
        states_here = states[id(r)]
        suite = xml.SubElement(
            top,
            "testsuite",
            name=r.pipeline,
            tests=str(len(states_here)),
            failures=str(sum(s in FAILS for s in states_here)),
            skipped=str(sum(s in ("skipped", "elsewhere") for s in states_here)),
        )
        for o in r.outcomes:
            _add_bound_case(suite, o, r)
        for d in r.drifts:
            _add_drift_case(suite, d, r)
    for element in top.iter():  # XML has no control characters at all
        element.text = element.text and sanitize_for_terminal(element.text)
        element.attrib.update({key: sanitize_for_terminal(value) for key, value in element.attrib.items()})
    xml.indent(top)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + xml.tostring(top, encoding="unicode")


def _add_test_case(suite: Any, name: str, span: Any, result: "Tested") -> Any:
    from xml.etree import ElementTree as xml

    where = {"line": str(span.line), "file": span.source.name} if span else {}
    return xml.SubElement(suite, "testcase", {"name": name, "classname": result.pipeline, **where})


def _add_bound_case(suite: Any, verdict: "BoundVerdict", result: "Tested") -> None:
    from xml.etree import ElementTree as xml

    case = _add_test_case(suite, bound_text(verdict.bound), verdict.bound.span, result)
    if verdict.state == "missed":
        xml.SubElement(case, "failure", message=f"{verdict_value_text(verdict)}, limit {verdict.limit}").text = str(
            result.path
        )
    elif verdict.state == "undecided":
        xml.SubElement(case, "failure", message=f"undecided: {verdict.undecided}").text = str(result.path)
    elif verdict.state == "skipped":
        xml.SubElement(case, "skipped", message=verdict.skipped)
    elif verdict.uncertainty_reason:
        xml.SubElement(case, "system-out").text = verdict.uncertainty_reason


def _add_drift_case(suite: Any, drift: "Drift", result: "Tested") -> None:
    from xml.etree import ElementTree as xml

    case = _add_test_case(suite, f"{drift.metric}, baseline", drift.span, result)
    if drift.state in FAILS:
        xml.SubElement(
            case, "failure", message=f"{drift.state}: {drift.text()}, at worst {drift_limit_text(drift)}"
        ).text = str(result.path)
    elif drift.state == "elsewhere":
        xml.SubElement(case, "skipped", message="a time of another machine")
