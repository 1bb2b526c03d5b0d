"""A header read from its source is what an import would give."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent

import pytest
from effc.compiler.plugin.header import RULES, read_plugin_header
from effc.compiler.plugin.registry import SHELVES, Registry
from effc.dsl.checker.rules import Conflict, MissingStep
from effc.dsl.checker.values import DataRef, Duration, MetricRef, Ratio
from effc.dsl.checker.vocabulary import REQUIRED

SHELF = Registry()
WORDS = [(kind, name) for kind in SHELVES for name in SHELF.vocabulary.words(kind)]


STAND_INS = {"ratio": Ratio(0.5), "metric": MetricRef("params"), "data": DataRef("rows"), "string": "text"}
STAND_INS |= {
    "duration": Duration(60.0),
    "int": 4,
    "list[string]": ("a", "b"),
    "list[step]": (),
    "list[metric]": (),
    "list[int]": (4, 2),
    "list[ratio]": (),
    "step": None,
}


def written(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "word.py"
    path.write_text(dedent(body), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind, name", WORDS)
def test_what_is_read_is_what_is_imported(kind, name):
    word, cls = SHELF.vocabulary.word(kind, name), SHELF.import_plugin_class(kind, name)
    assert word.doc == cleandoc(cls.__doc__)
    found = {field.name: field for field in fields(cls)}
    assert sorted(p.name for p in word.params) == sorted(found)
    for param in word.params:
        field = found[param.name]
        assert param.required == (
            repr(field.default) == "<dataclasses._MISSING_TYPE object>" or param.default is REQUIRED
        )
        if not param.required:
            assert param.default == field.default
        about = {k: getattr(param, k) for k in field.metadata}
        assert about == dict(field.metadata)
    for fact, value in word.facts.items():
        assert getattr(cls, fact) == value


@pytest.mark.parametrize("kind, name", WORDS)
def test_rules_from_the_source_say_what_the_imported_class_says(kind, name):
    word, cls = SHELF.vocabulary.word(kind, name), SHELF.import_plugin_class(kind, name)
    defaults = {p.name: STAND_INS[p.types[0]] if p.required else p.default for p in word.params}
    choices = [
        {p.name: choice} for p in word.params for choice in (*p.choices, *[True, False] * (p.types == ("bool",)))
    ]
    for arguments in [{}, *choices, *({**a, **b} for a in choices for b in choices)]:
        read, imported = word.rules(defaults | arguments), cls(**defaults | arguments)
        for rule in sorted(RULES):
            answers = [getattr(rules, rule)() for rules in (read, imported)]
            assert len({repr(list(a) if isinstance(a, Iterator) else a) for a in answers}) == 1, (rule, arguments)


@pytest.mark.parametrize("kind, name", WORDS)
def test_problems_are_of_parameters_that_the_word_has(kind, name):
    word = SHELF.vocabulary.word(kind, name)
    for problem in word.problems:
        assert {*problem.params, *getattr(problem, "deciding", ())} <= {p.name for p in word.params}
        assert not isinstance(problem, MissingStep) or problem.step in SHELF.vocabulary.words("pass")


@pytest.mark.parametrize("kind, name", WORDS)
def test_what_must_be_given_comes_first_then_a_words_own_parameters_then_those_it_shares(kind, name):
    word, cls = SHELF.vocabulary.word(kind, name), SHELF.import_plugin_class(kind, name)
    declares = {p.name: next(c for c in cls.__mro__[::-1] if p.name in vars(c)) for p in word.params if not p.required}
    depths = [cls.__mro__.index(declares[p.name]) for p in word.params if not p.required]
    assert [p.required for p in word.params] == sorted((p.required for p in word.params), reverse=True)
    assert depths == sorted(depths)


@pytest.mark.parametrize("kind, name", WORDS)
def test_every_parameter_has_a_sentence_and_a_default_within_its_bounds(kind, name):
    from effc.dsl.checker.limits import validate_or_report

    for param in SHELF.vocabulary.word(kind, name).params:
        assert param.doc.endswith(".") and (param.doc[0].isupper() or param.doc[0] in "`0123456789"), param.name
        if not param.required and param.default is not None:
            assert validate_or_report(param.default, param, None, lambda fault: None), param.name


def test_types_choices_bounds_and_facts_are_read(tmp_path):
    word = read_plugin_header(
        "pass",
        "some.word",
        written(
            tmp_path,
            '''
        import torch
        class Some(Pass):
            """Do something.

            More of it.
            """
            keeps = Close(atol=1e-5)
            after = {"prune.blocks": "it needs the shapes"}
            helper: ClassVar[int] = 3
            keep: Ratio = param("Share.", of=("channels",), gt=0, le=1)
            count: int | Ratio | None = param("How many.", default=None)
            how: Literal["fast", "well"] = param("How.", default="fast")
            ranks: list[int] = param("Ranks.", default=(8, 16), ge=1)
            names: str | tuple[str, ...] = param("Names.", default="x")
            on: Selector = param("Where.", default=Selector((("|", "*.mlp"),)))
        ''',
        ),
    )
    keep, count, how, ranks, names, on = word.params
    assert (keep.types, keep.of, keep.gt, keep.required) == (("ratio",), ("channels",), 0, True)
    assert (count.types, count.default) == (("int", "ratio"), None)
    assert (how.types, how.choices) == (("choice",), ("fast", "well"))
    assert ranks.types == ("list[int]",) and names.types == ("string", "list[string]")
    assert on.default.terms == (("|", "*.mlp"),)
    assert word.facts["keeps"].atol == 1e-5 and word.facts["helper"] == 3 and word.facts["determinism"] == "seeded"
    assert word.summary == "Do something."


def test_a_rule_runs_without_the_rest_of_its_file(tmp_path):
    word = read_plugin_header(
        "pass",
        "some.word",
        written(
            tmp_path,
            '''
        raise SystemExit("imported")
        class Some(Pass):
            """Do something."""
            results = ("model", "adapters")
            count: int = param("How many.", default=2)
            apart: bool = param("Whether apart.", default=False)
            def problems(self):
                yield from self._count_problems()
            def _count_problems(self):
                if self.apart and self.count < 3:
                    yield Conflict(("apart", "count"), "two are not apart", "give three")
            def effects(self):
                yield from super().effects()
                if self.count > 2:
                    yield "uneven widths"
            def result_kind(self):
                return self.results[self.apart]
        ''',
        ),
    )
    apart, many = word.rules({"apart": True}), word.rules({"count": 3})
    assert (
        list(apart.problems()) == [*word.problems] == [Conflict(("apart", "count"), "two are not apart", "give three")]
    )
    assert list(many.problems()) == [] and list(many.effects()) == ["uneven widths"] and list(apart.effects()) == []
    assert (many.result_kind(), apart.result_kind()) == ("model", "adapters")


def test_what_words_share_is_read_where_a_relative_import_leads(tmp_path):
    (tmp_path / "shared.py").write_text(
        dedent(
            """
        class Step(Pass):
            accepts = ("family",)
            count: int = param("How many.", default=1)
            rate: float = param("How fast.", default=0.5)
        class Slow(Step):
            count: int = param("How many.", default=2)
        """
        ),
        encoding="utf-8",
    )
    word = read_plugin_header(
        "pass",
        "word",
        written(
            tmp_path,
            '''
        from .shared import Slow
        class Some(Slow):
            """Do something."""
            seed: int = param("Which.", default=3)
        ''',
        ),
    )
    assert [(p.name, p.default) for p in word.params] == [("seed", 3), ("count", 2), ("rate", 0.5)]
    assert word.facts["accepts"] == ("family",) and word.doc == "Do something."


def test_a_name_for_choices_is_read_where_it_is_written(tmp_path):
    (tmp_path / "shared.py").write_text(
        'Fine = Literal["well", "best"]\nHow = Literal["fast"] | Fine\n', encoding="utf-8"
    )
    word = read_plugin_header(
        "pass",
        "word",
        written(
            tmp_path,
            '''
        from .shared import Fine, How
        class Some(Pass):
            """Do something."""
            how: Literal["auto"] | How = param("How.", default="auto")
            ways: list[Fine] = param("Ways.", default=())
            many: int | How | None = param("How many.", default=None)
        ''',
        ),
    )
    how, ways, many = word.params
    assert (how.types, how.choices) == (("choice",), ("auto", "fast", "well", "best"))
    assert (ways.types, ways.choices) == (("list[choice]",), ("well", "best"))
    assert (many.types, many.choices) == (("int", "choice"), ("fast", "well", "best"))


@pytest.mark.parametrize(
    "body, said",
    [
        ('class A(Pass):\n    """D."""\n    keeps = make()', "not literal"),
        ('class A(Pass):\n    """D."""\n    keeps = Lossy().__class__', "not literal"),
        ('class A(Pass):\n    """D."""\n    conflicts = {"a & b": ("why", "what")}', "is a method now: `problems`"),
        (
            'class A(Pass):\n    """D."""\n    def problems(self):\n        yield Conflict((x,), "A.", "B.")',
            "not literal",
        ),
        ("class A(Pass):\n    pass", "no docstring"),
        ("x = 1", "0 classes derive from Pass"),
        ('class A(Pass):\n    """D."""\n    x: Tensor = param("X.")', "no type that a recipe can write"),
        ('class A(Pass):\n    """D."""\n    x: int | None = param("X.", default=3)', "None is its default"),
        ('X = make()\nclass A(Pass):\n    """D."""\n    x: X = param("X.")', "no type that a recipe can write"),
    ],
)
def test_a_header_that_is_not_literal_names_file_and_line(tmp_path, body, said):
    with pytest.raises(AssertionError, match=said) as caught:
        read_plugin_header("pass", "a", written(tmp_path, body))
    assert "word.py" in str(caught.value)


def test_targets_have_a_path_that_needs_no_name():
    assert all(word.param("path").positional for word in SHELF.vocabulary.words("target").values())


def test_reading_all_headers_imports_no_torch():
    code = (
        "import sys; from effc.compiler.plugin.registry import Registry, SHELVES; v = Registry().vocabulary; "
        "[v.word(k, n) for k in SHELVES for n in v.words(k)]; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
