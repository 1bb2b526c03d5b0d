"""Whether the JSON of a manifest and of its measures is of the form that effc writes, whoever wrote it."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ...dsl.syntax.control_characters import control_in

_DEEPEST = 40


def check_manifest_form(data: Mapping[str, Any], measured: Mapping[str, Any], records: Mapping[str, type]) -> None:
    """Raises ValueError or KeyError with the field that is of another form."""
    for name, fits in _STEADY.items():
        _need(fits(data[name]), name)
    _need(
        all(
            isinstance(v, list) and len(v) == 2 and type(v[0]) is int and v[0] >= 0 and isinstance(v[1], str)
            for v in data["files"].values()
        ),
        "files",
    )
    _need(_is_texts(data["lock"].get("versions", {})), "lock.versions")
    _need(_is_table(data["lock"].get("inputs", {})), "lock.inputs")
    _need(all(isinstance(data["recipe"].get(name, ""), str) for name in ("name", "text", "variant")), "recipe")
    _need(_is_table(data["recipe"].get("params", {})), "recipe.params")
    for step in data["steps"]:
        texts = [step.get(name, "") for name in ("name", "word", "summary")]
        _need(_is_words(texts) and is_plain_text(texts), "steps")
        warnings = step.get("warnings", [])
        _need(_is_records(warnings) and all(map(_is_texts, warnings)) and is_plain_text(warnings), "steps")
        _need(_is_records(step.get("decisions", [])) and _is_words(step.get("changes", [])), "steps")
    _need(not data["profile"] or set(data["profile"]) == {"before", "after"}, "profile")
    for side in data["profile"]:
        _need(is_profile(data["profile"][side]), f"profile.{side}")
    _need(_is_depth(data, 0) and _is_depth(measured, 0), "values nested too deep")
    for name in ("kind", "name", "effc", "lock", "files"):
        _need(is_plain_text(data[name]), name)
    for name in ("machine", "measures"):
        _need(is_plain_text(measured.get(name, [])), name)
    for name in ("machine", "run"):
        _need(_is_table(measured.get(name, {})), name)
    for name, kind in records.items():
        for record in measured.get(name, ()):
            _need(
                isinstance(record, Mapping)
                and all(_IS.get(f.type, _is_plain_value)(record[f.name]) for f in fields(kind) if f.name in record),
                name,
            )


def _need(condition: bool, field: str) -> None:
    if not condition:
        raise ValueError(f"`{field}` is of another form")


def is_profile(value: Any) -> bool:
    """Layers by path, their branches by name, a role and counts of each (`analysis/planning/layer_profile.py`)."""
    return _is_table(value) and all(
        _is_table(branches) and all(map(_is_branch, branches.values())) for branches in value.values()
    )


def _is_branch(value: Any) -> bool:
    return _is_table(value) and all(
        isinstance(fact, str) if name == "role" else type(fact) is int and 0 <= fact < 1 << 48
        for name, fact in value.items()
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, str) for item in value.values())


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_table, value))


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_plain_value(value: Any) -> bool:
    """A number, a text or a row of them: what records hold beside the kinds below."""
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (
            isinstance(value, (list, tuple))
            and all(item is None or isinstance(item, (int, float, str)) for item in value)
        )
    )


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_finite, value)))


def _is_finite(value: Any) -> bool:
    return _is_number(value) and abs(value) < 1e300


def is_plain_text(value: Any) -> bool:
    """Whether no name and no text has a control character: verbs print each on a line, where it could pass for ours."""
    if isinstance(value, Mapping):
        return all(map(is_plain_text, value)) and all(map(is_plain_text, value.values()))
    if isinstance(value, list):
        return all(map(is_plain_text, value))
    return not isinstance(value, str) or not control_in(value)


def _is_depth(value: Any, depth: int) -> bool:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return depth < _DEEPEST and all(_is_depth(item, depth + 1) for item in items)


_STEADY: dict[str, Callable[[Any], bool]] = {
    "kind": _is_text,
    "name": _is_text,
    "effc": _is_text,
    "recipe": _is_table,
    "lock": _is_table,
    "steps": _is_records,
    "profile": _is_table,
    "notes": _is_words,
    "files": _is_table,
}
_IS: dict[Any, Callable[[Any], bool]] = {
    "str": _is_text,
    str: _is_text,
    float: lambda v: _is_number(v) or v is None,  # nan is null in JSON
    float | None: lambda v: _is_number(v) or v is None,
    tuple[float, float] | None: _is_interval,
    int: lambda v: type(v) is int,
}
