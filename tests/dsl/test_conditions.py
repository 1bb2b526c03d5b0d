"""Conditions in headers: what terms mean, and that they are of parameters that the word has."""

import pytest
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.conditions import compared_in, condition_names, meets
from effc.dsl.checker.values import DataRef, Ratio

ARGS = {
    "clients": 3,
    "share": Ratio(0.1),
    "ranks": (1, 2),
    "rows": DataRef("a"),
    "budgets": (Ratio(0.5), Ratio(0.9)),
    "way": "align",
    "left": None,
}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("clients < 3", False),
        ("clients < 4", True),
        ("clients > 2", True),
        ("count ranks != clients", True),
        ("count ranks != 2", False),
        ("count rows < 2", True),  # one where it is no list
        ("share * clients < 0.5", True),
        ("share * clients < 0.3", False),
        ("most budgets < 100%", True),
        ("most budgets < 90%", False),
        ("way: align | project", True),
        ("not way: align | project", False),
        ("left & count left > 5", False),  # what is left out is not counted
        ("way: align & clients < 4 & not left", True),
    ],
)
def test_terms_compare_numbers_and_words(condition, holds):
    assert meets(condition, ARGS) == holds


def test_parameters_are_named_in_their_order():
    assert condition_names("share * clients < 0.5 & not way: align & count ranks != clients") == [
        "share",
        "clients",
        "way",
        "ranks",
        "clients",
    ]
    assert compared_in("way: align & share * clients < 0.5") == ["share", "clients"]


def test_every_header_speaks_of_parameters_that_its_word_has():
    vocabulary = Registry().vocabulary
    for kind in ("pass", "target", "metric", "data"):
        for word in vocabulary.words(kind).values():
            told = {p.name for p in word.params}
            only = word.facts.get("only", {})
            assert set(only) <= told, word.name
            for conditions in (*word.facts.get("conflicts", {}), *only.values()):
                assert set(condition_names(conditions)) <= told, f"{word.name}: {conditions}"
