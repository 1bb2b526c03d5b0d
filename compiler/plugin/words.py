"""Namespaces of the words of recipes: `prune.multi`, `targets.hf`. Their types are in `words.pyi`."""

from typing import Any

from .word_functions import namespace, namespace_names


def __getattr__(name: str) -> Any:
    return namespace(name)


def __dir__() -> list[str]:
    return namespace_names()
