"""Whether the JSON of a manifest and of its measures is of the form that effc writes, whoever wrote it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from ...dsl.syntax.control_characters import first_control_character
from ...dsl.syntax.json_types import from_json, make_range_predicate

_DEEPEST = 40


def _is_branch(facts: Mapping[str, Any]) -> bool:
    return all(
        isinstance(fact, str) if name == "role" else type(fact) is int and 0 <= fact < 1 << 48
        for name, fact in facts.items()
    )


def _is_plain_value(value: Any) -> bool:
    """A number, a text or a row of them: what records hold beside the kinds below."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return all(item is None or isinstance(item, (int, float, str)) for item in items)


def is_plain_text(value: Any) -> bool:
    """Whether no name and no text has a control character: verbs print each on a line, where it could pass for ours."""
    if isinstance(value, Mapping):
        return all(map(is_plain_text, value)) and all(map(is_plain_text, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain_text, value))
    return not isinstance(value, str) or not first_control_character(value)


Table = Mapping[str, Any]
PlainText = Annotated[str, is_plain_text]
Finite = Annotated[float, make_range_predicate(-1e300, 1e300)]
# Layers by path, their branches by name, a role and counts of each (`analysis/planning/layer_profile.py`).
Profile = Mapping[str, Mapping[str, Annotated[Table, _is_branch]]]
_STEADY: dict[str, Any] = {
    "kind": PlainText,
    "name": PlainText,
    "effc": PlainText,
    "recipe": Table,
    "lock": Annotated[Table, is_plain_text],
    "steps": tuple[Table, ...],
    "profile": Annotated[Mapping[str, Profile], lambda profile: not profile or set(profile) == {"before", "after"}],
    "notes": tuple[str, ...],
    "files": Annotated[Mapping[str, tuple[Annotated[int, make_range_predicate(0, 1 << 62)], str]], is_plain_text],
}
_RECIPE: dict[str, Any] = {"name": str, "text": str, "variant": str, "params": Table}
_LOCK: dict[str, Any] = {"versions": Mapping[str, str], "inputs": Table}
_STEP: dict[str, Any] = {
    "name": PlainText,
    "word": PlainText,
    "summary": PlainText,
    "warnings": Annotated[tuple[Mapping[str, str], ...], is_plain_text],
    "decisions": tuple[Table, ...],
    "changes": tuple[str, ...],
}
_VOLATILE: dict[str, Any] = {
    "machine": Annotated[Table, is_plain_text],
    "run": Table,
    "measures": Annotated[Any, is_plain_text],
}
_RECORD: dict[Any, Any] = {
    "str": str,
    str: str,
    float: float | None,  # nan is null in JSON
    float | None: float | None,
    tuple[float, float] | None: tuple[Finite, Finite] | None,
    int: int,
}


def check_manifest_form(
    manifest_json: Mapping[str, Any], measures_json: Mapping[str, Any], records: Mapping[str, type]
) -> None:
    """Raises ValueError or KeyError with the field that is of another form."""
    if not (_is_shallow(manifest_json, 0) and _is_shallow(measures_json, 0)):
        raise ValueError("values are nested too deep")
    for name, kind in _STEADY.items():
        from_json(manifest_json[name], kind, name)
    _check_present(manifest_json["recipe"], _RECIPE, "recipe.")
    _check_present(manifest_json["lock"], _LOCK, "lock.")
    for step in manifest_json["steps"]:
        _check_present(step, _STEP, "steps.")
    _check_present(measures_json, _VOLATILE)
    for name, record_kind in records.items():
        kinds = {f.name: _RECORD.get(f.type, Annotated[Any, _is_plain_value]) for f in fields(record_kind)}
        for record in from_json(measures_json.get(name, []), tuple[Table, ...], name):
            _check_present(record, kinds, f"{name}.")


def _check_present(data: Mapping[str, Any], kinds: Mapping[str, Any], path: str = "") -> None:
    for name in data.keys() & kinds.keys():
        from_json(data[name], kinds[name], path + name)


def _is_shallow(value: Any, depth: int) -> bool:
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return depth < _DEEPEST and all(_is_shallow(item, depth + 1) for item in items)
