"""The model card: `README.md` of an artifact, for a person who meets the folder without its recipe."""

import textwrap

from ..core.quantity import interval_text
from ..core.warned import warning_sentence
from .form_losses import Account, account_rows
from .load import target_facts
from .manifest import Check, Expectation, Manifest, Measure
from .search_summary import search_summary_lines


def model_card(manifest: Manifest) -> str:
    """Markdown: what it is, how to load it, what was measured, what was changed."""
    name = manifest.name or str(manifest.recipe.get("name", "")) or "model"
    parts = [
        _yaml_front_matter(manifest),
        f"# {name}",
        _origin_sentence(manifest),
        _how_to_load_section(manifest),
        _measures_section(manifest),
        _bounds_section(manifest.expectations),
        _divergence_section(manifest.accounts),
        _changes_section(manifest),
        _kernels_section(manifest),
        _reopened_forms_section(manifest.checks),
        _recipe_section(manifest),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _yaml_front_matter(manifest: Manifest) -> str:
    library = "transformers" if any(n.startswith(("model/", "compat/")) for n in manifest.files) else "effc"
    return f"---\nlibrary_name: {library}\ntags:\n- effc\n---"


def _origin_sentence(manifest: Manifest) -> str:
    inputs = [f"`{label}`" for label in manifest.lock.get("inputs", {})]
    source = f" from {', '.join(inputs)}" if inputs else ""
    size = _size_text(manifest.bytes)
    return f"Compiled{source} by effc {manifest.effc} for the target `{manifest.kind}`, {size}."


def _how_to_load_section(manifest: Manifest) -> str:
    folders = {n.split("/")[0] for n in manifest.files}
    header = target_facts(manifest.kind)
    lines = [f"- {text}" for folder, text in header.get("loads", {}).items() if folder in folders]
    lines += [f"- {header['use'][0].upper()}{header['use'][1:]}."] if header.get("use") else []
    lines += [f"- {note}" for note in manifest.notes]
    return "\n".join(["## Load", "", *lines]) if lines else ""


def _measures_section(manifest: Manifest) -> str:
    if not manifest.measures:
        return ""
    rows = [
        [f"`{m.metric}`", _measure_text(m.original, m.unit), _compiled_value_text(m) or m.untimed, _ratio_text(m)]
        for m in manifest.measures
    ]
    machine = manifest.machine
    where = ", ".join(str(v) for v in (machine.get("cpu"), _thread_count_text(machine), machine.get("os")) if v)
    return "\n".join(
        [
            "## Measured",
            "",
            _markdown_table(["", "original", "compiled", "ratio"], rows),
            *(["", f"On {where}."] if where else []),
        ]
    )


def _bounds_section(expectations: tuple[Expectation, ...]) -> str:
    if not expectations:
        return ""
    rows = [
        [f"`{e.text}`", _measure_text(e.value, ""), e.limit, f"{e.outcome} ({e.note})" if e.note else e.outcome]
        for e in expectations
    ]
    return "\n".join(["## Expected", "", _markdown_table(["bound", "value", "limit", "outcome"], rows)])


def _divergence_section(accounts: tuple[Account, ...]) -> str:
    if not accounts:
        return ""
    head, *rows = account_rows(accounts)
    caption = f"On {accounts[0].where}. KL, in nats per token, from the original is what compression and format cost "
    caption += "together; from the program in memory, what the format alone changed."
    return "\n".join(
        ["## The same tokens through each form", "", caption, "", _markdown_table(list(head), list(map(list, rows)))]
    )


def _changes_section(manifest: Manifest) -> str:
    if not manifest.steps:
        return ""
    rows = [[f"`{s.get('name', '')}`", f"`{s.get('word', '')}`", _step_summary(s)] for s in manifest.steps]
    lines_searched = search_summary_lines(manifest.steps)
    searched = ["", *(f"Searched: {line}." for line in lines_searched)] if lines_searched else []
    warnings = [
        f"Warning of `{s.get('name', '')}`: {warning_sentence(w)}."
        for s in manifest.steps
        for w in s.get("warnings", ())
    ]
    warned = [line for warning in warnings for line in ("", warning)]
    return "\n".join(["## Changed", "", _markdown_table(["step", "pass", "change"], rows), *searched, *warned])


def _kernels_section(manifest: Manifest) -> str:
    """Kernels of linear modules, one row for equal ones; the manifest lists each module."""
    groups: dict[tuple, list[dict]] = {}
    for step in manifest.steps:
        for decision in step.get("decisions", ()):
            for entry in decision.get("lowered", ()):
                shape, zeros = "{} x {}".format(*entry["shape"]), f"{100 * entry['zeros']:.0f} %"
                key = (shape, entry["format"], zeros)
                groups.setdefault(key, []).append(entry)
    if not groups:
        return ""
    rows = [
        [
            shape,
            str(len(same)),
            format,
            zeros,
            f"{sum(e['bytes'] for e in same) / sum(e['bytes_before'] for e in same):.2f}",
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in same[0]["faster_than"].items()),
            same[0]["why"],
        ]
        for (shape, format, zeros), same in groups.items()
    ]
    head = ["outputs x inputs", "modules", "format", "zeros", "bytes", "times as fast as", "because"]
    caption = "Times of each are of one race on that machine; `manifest.json` names every module."
    return "\n".join(["## Kernels", "", caption, "", _markdown_table(head, rows)])


def _step_summary(step) -> str:
    if step.get("summary"):
        return str(step["summary"])
    changes = step.get("changes") or ()
    if isinstance(changes, (str, int, float)):
        return str(changes)
    texts = [", ".join(f"{k} {v}" for k, v in c.items()) if isinstance(c, dict) else str(c) for c in list(changes)[:8]]
    return "; ".join(texts) + (f"; {len(changes) - 8} more" if len(changes) > 8 else "")


def _reopened_forms_section(checks: tuple[Check, ...]) -> str:
    if not checks:
        return ""
    forms: dict[str, list[Check]] = {}
    for check in checks:
        forms.setdefault(check.what.partition(",")[0], []).append(check)
    rows = [
        [f"`{form}`", str(len(form_checks)), f"{closest.worst:.2g}", f"{closest.tolerance:.2g}"]
        for form, form_checks in forms.items()
        for closest in [max(form_checks, key=lambda c: c.worst / c.tolerance if c.tolerance else c.worst)]
    ]
    compared = dict.fromkeys(check.what.partition(": ")[2] or check.what for check in checks)
    sentence = f"Reopened in a fresh process and compared with the model in memory: {'; '.join(compared)}."
    return "\n".join(
        [
            "## Checked",
            "",
            textwrap.fill(sentence, 100),
            "",
            _markdown_table(["form", "outputs", "closest to its limit", "allowed"], rows),
        ]
    )


def _recipe_section(manifest: Manifest) -> str:
    text = str(manifest.recipe.get("text", "")).rstrip()
    if not text:
        return ""
    fence = "`" * max(3, 1 + max((len(run) for run in _backtick_runs(text)), default=0))
    variant = f" ({manifest.recipe['variant']})" if manifest.recipe.get("variant") else ""
    return f"## Recipe{variant}\n\n{fence}\n{text}\n{fence}"


def _backtick_runs(text: str) -> list[str]:
    import re

    return re.findall("`+", text)


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    def line(columns: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in columns) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


def _ratio_text(measure: Measure) -> str:
    if measure.ratio is None:
        return ""
    return interval_text(measure.ratio, measure.interval) if measure.interval else f"{measure.ratio:.3f}"


def _compiled_value_text(measure: Measure) -> str:
    if measure.interval and measure.ratio is None and measure.compiled is not None:
        return f"{interval_text(measure.compiled, measure.interval)} {measure.unit}".rstrip()
    return _measure_text(measure.compiled, measure.unit)


def _measure_text(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit in ("B", "bytes"):
        return _size_text(value)
    text = f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def _size_text(count: float) -> str:
    from ..core.quantity import size_text

    return size_text(count)


def _thread_count_text(machine) -> str:
    from ..core.quantity import count_text

    return count_text(machine["threads"], "thread") if machine.get("threads") else ""
