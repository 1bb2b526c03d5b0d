"""JSON of files that may come from anybody, read as the type that it should have."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN: dict[Any, tuple[type, ...]] = {
    str: (str,),
    bool: (bool,),
    int: (int,),
    float: (int, float),
    NoneType: (NoneType,),
}


def from_json(data: Any, kind: Any, path: str = "") -> Any:
    """Data of JSON as a value of a type. Raises ValueError with the field that is of another form.

    kind   a dataclass, whose fields without a default are required and which has no others; a list, or a sequence,
           which becomes a tuple; a mapping with names or whole numbers as keys; `Literal`, a union, or a type of
           JSON. `Annotated[kind, predicate]` holds where the predicate is true of the value
    path   of the data in what was read: `sizes.0.params`
    """
    if kind in _PLAIN:
        return data if type(data) in _PLAIN[kind] else _raise_mismatch(path)
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        value = from_json(data, arguments[0], path)
        return value if all(is_met(value) for is_met in arguments[1:]) else _raise_mismatch(path)
    if origin in (Union, UnionType):
        return _first_fitting_from_json(data, arguments, path)
    if origin is Literal:
        return (
            data if any(data == value and type(data) is type(value) for value in arguments) else _raise_mismatch(path)
        )
    if origin in (tuple, Sequence, list):
        items = _tuple_from_json(data, arguments, path)
        return list(items) if origin is list else items
    if origin in (Mapping, dict):
        return _dict_from_json(data, arguments, path)
    if is_dataclass(kind):
        return _dataclass_from_json(data, kind, path)
    assert kind is Any, f"JSON has no {kind}"
    return data


def _first_fitting_from_json(data: Any, kinds: tuple[Any, ...], path: str) -> Any:
    for kind in kinds[:-1]:
        try:
            return from_json(data, kind, path)
        except ValueError:
            continue
    return from_json(data, kinds[-1], path)


def _tuple_from_json(data: Any, kinds: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        _raise_mismatch(path)
    item_kinds = kinds if kinds[1:] and kinds[1] is not ... else (kinds[0],) * len(data)
    if len(item_kinds) != len(data):
        _raise_mismatch(path)
    return tuple(
        from_json(item, kind, _inner_path(path, at))
        for at, (item, kind) in enumerate(zip(data, item_kinds, strict=True))
    )


def _dict_from_json(data: Any, kinds: tuple[Any, ...], path: str) -> dict[Any, Any]:
    key_kind, kind = kinds
    if not isinstance(data, dict):
        _raise_mismatch(path)
    names = (int(name) if key_kind is int and re.fullmatch(r"-?\d+", name) else name for name in data)
    return {
        from_json(name, key_kind, _inner_path(path, name)): from_json(value, kind, _inner_path(path, name))
        for name, value in zip(names, data.values(), strict=True)
    }


def _dataclass_from_json(data: Any, kind: Any, path: str) -> Any:
    if not isinstance(data, dict):
        _raise_mismatch(path)
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(data.keys() - known.keys()):
        _raise_mismatch(_inner_path(path, unknown[0]))
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            _raise_mismatch(_inner_path(path, name))
    hints = _type_hints(kind)
    return kind(**{name: from_json(value, hints[name], _inner_path(path, name)) for name, value in data.items()})


@cache
def _type_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _inner_path(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _raise_mismatch(path: str) -> Any:
    raise ValueError(f"`{path[:120]}` is missing, of another form, or out of its range")


def make_range_predicate(low: float, high: float) -> Any:
    """Predicate of numbers from `low` to `high`; NaN is none of them."""
    return lambda value: low <= value <= high
