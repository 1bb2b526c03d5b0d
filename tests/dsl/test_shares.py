"""Named shares, from every place that a recipe's values come from to the value that a pass gets."""

import json
from math import isclose

import pytest
from effc.compiler.cli.explain import explain_page
from effc.compiler.plugin.header import read_plugin_header
from effc.dsl.checker.check import check_recipe_file
from effc.dsl.checker.limits import validate_or_report
from effc.dsl.checker.overrides import read_overrides
from effc.dsl.checker.value_text import plain_value_text, value_text
from effc.dsl.checker.values import Shares, value_from_json, value_to_json
from effc.dsl.checker.vocabulary import Param, Vocabulary, Word
from effc.dsl.syntax.format import format_source
from effc.dsl.syntax.json_form import file_from_json, file_to_json
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.render import apply_fixes
from effc.dsl.syntax.source import Source
from hypothesis import given
from hypothesis import strategies as st

THINGS = ("blocks", "channels", "heads")
CUT = Word("pass", "cut", "Cut.", (Param("split", ("shares",), "How.", of=THINGS),))
WORDS = Vocabulary(
    {
        "pass": {"cut": CUT},
        "model": {"made": Word("model", "made", "Made.")},
        "target": {"out": Word("target", "out", "Out.", (Param("path", ("string",), "Where.", positional=True),))},
    }
)
PARAM = "param split: shares = {blocks: 1}\n"
RECIPE = """effspec 1
PARAM
model base = made()
pipeline main(base) {
  a = cut(split: SPLIT)
}
emit main { out("x") }
"""

names = st.lists(st.sampled_from(THINGS), min_size=1, unique=True)
parts = st.integers(0, 10**6).map(float) | st.floats(0, 1e6)
divided = (
    names.flatmap(
        lambda n: st.lists(parts, min_size=len(n), max_size=len(n)).map(lambda p: tuple(zip(n, p, strict=True)))
    )
    .map(Shares)
    .filter(lambda s: sum(p for _, p in s.parts) > 0)
)


def recipe(split: str) -> str:
    return RECIPE.replace("SPLIT", split).replace("PARAM", PARAM if split == "split" else "")


def checked(split: str, **given):
    parsed = parse(Source("recipe.effspec", recipe(split)))
    assert not parsed.diagnostics
    return check_recipe_file(parsed.file, WORDS, overrides=read_overrides(**given))


def split_of(found) -> Shares:
    assert not found.diagnostics, [d.message for d in found.diagnostics]
    ((step,),) = (p.steps for p in found.recipes[0].pipelines.values())
    return step.call.args["split"]


def close(a: Shares, b: Shares) -> bool:
    """Text keeps twelve digits after the point."""
    return [n for n, _ in a.parts] == [n for n, _ in b.parts] and all(
        isclose(p, q, abs_tol=1e-11) for (_, p), (_, q) in zip(a.parts, b.parts, strict=True)
    )


@given(divided)
def test_shares_survive_json(shares):
    assert value_from_json(json.loads(json.dumps(value_to_json(shares)))) == shares


@given(divided)
def test_shares_add_up_to_one_and_scaling_them_changes_nothing(shares):
    assert isclose(sum(shares.share(n) for n in THINGS), 1)
    twice = Shares(tuple((n, 2 * p) for n, p in shares.parts))
    assert all(isclose(twice.share(n), shares.share(n)) for n in THINGS)


@given(divided)
def test_shown_shares_read_back_from_recipe_command_line_and_params_file(shares):
    text = value_text(shares)
    assert text == plain_value_text(shares)
    value = dict(shares.parts)
    for found in (
        checked(text),
        checked("split", set_options=[f"split={text}"]),
        checked("split", environment={"EFFC_PARAM_split": text}),
        checked("split", params_source=Source("p.json", json.dumps({"split": value}))),
        checked("split", params_source=Source("p.json", json.dumps({"split": text}))),
    ):
        assert close(split_of(found), shares)


def test_percentages_and_numbers_divide_alike():
    percentages = split_of(checked("{blocks: 44%, channels: 52%, heads: 4%}"))
    numbers = split_of(checked("{blocks: 11, channels: 13, heads: 1}"))
    assert [percentages.share(n) for n in THINGS] == pytest.approx([0.44, 0.52, 0.04])
    assert [numbers.share(n) for n in THINGS] == pytest.approx([0.44, 0.52, 0.04])
    assert split_of(checked("{heads: 44%, blocks: 0}")).share("heads") == 1


@pytest.mark.parametrize(
    "given, slug, message",
    [
        ({"set_options": ["split={blocks: -1}"]}, "unfit-override", "`blocks` is -1, the least is 0"),
        ({"set_options": ["split={blocks: 1, blocks: 2}"]}, "unfit-override", "`blocks` has two shares"),
        ({"set_options": ["split={blocks: 0}"]}, "unfit-override", "`split` sums to 0, which shares nothing out"),
        ({"set_options": ["split={q,k}"]}, "unfit-override", "`split` is a string, a set of shares is needed"),
        ({"set_options": ["split={neurons: 1}"]}, "unknown-share", "`split` has no share of `neurons`"),
        (
            {"params_source": Source("p", '{"split": {"blocks": 1, "blocks": 2}}')},
            "unfit-override",
            "`blocks` has two shares",
        ),
        (
            {"params_source": Source("p", '{"split": {"a b": 1}}')},
            "bad-override",
            "`split` of the params file is no value of a param",
        ),
        (
            {"params_source": Source("p", '{"split": {"a": null}}')},
            "bad-override",
            "`split` of the params file is no value of a param",
        ),
        *(
            (
                {"params_source": Source("p", f'{{"split": {{"blocks": {number}}}}}')},
                "bad-override",
                "`split` of the params file is no value of a param",
            )
            for number in ("NaN", "-Infinity", "1e400")
        ),
    ],
)
def test_shares_from_outside_are_held_against_the_same_rules(given, slug, message):
    (found,) = checked("split", **given).diagnostics
    assert (found.slug, found.message) == (slug, message)


def test_globs_and_json_in_strings_are_no_shares():
    taken = read_overrides(["on={q,k}_proj", "both={q,k}", "said={q: k"]).by_name
    assert [o.value.value for o in taken.values()] == ["{q,k}_proj", "{q,k}", "{q: k"]


@given(st.text(alphabet="{}:, ab1%", max_size=12))
def test_any_text_of_a_command_line_has_a_value(text):
    assert read_overrides([f"split={text}"]).by_name["split"].value is not None


def test_the_nearest_name_is_put_in_its_place():
    text = recipe("{blocks: 44, chanels: 52}")
    file = parse(Source("recipe.effspec", text)).file
    mended = apply_fixes(text, check_recipe_file(file, WORDS).diagnostics)
    assert "{blocks: 44, channels: 52}" in mended
    assert not check_recipe_file(parse(Source("recipe.effspec", mended)).file, WORDS).diagnostics


def test_every_wrong_share_is_told():
    found = checked("{block: 1, heads: -1, heads: nothing, channels: 1GiB}").diagnostics
    assert sorted(d.slug for d in found if d.severity == "error") == [
        "out-of-range",
        "repeated-share",
        "unknown-name",
        "unknown-share",
        "wrong-unit",
    ]


def test_shares_in_the_arguments_of_an_unknown_word_count_as_used():
    text = recipe("{blocks: most}").replace("cut(", "cutt(").replace("model base", "param most: int = 3\nmodel base")
    found = check_recipe_file(parse(Source("recipe.effspec", text)).file, WORDS).diagnostics
    assert [d.slug for d in found] == ["unknown-word"]


def test_shares_that_do_not_fit_a_line_stand_one_a_line_with_their_comments():
    long = ", ".join(f"{'x' * 20}{i}: {i}" for i in range(5))
    text = f"effspec 1\n\nmodel a = made(s: {{ {long}, # last\n }}, t: {{a: 1}})\n"
    formatted = format_source(Source("a", text))
    assert (
        f"  s: {{\n    {'x' * 20}0: 0,\n" in formatted
        and f"{'x' * 20}4: 4,  # last\n  }},\n  t: {{a: 1}},\n" in formatted
    )
    assert format_source(Source("a", formatted)) == formatted


def test_the_json_form_keeps_order_and_what_stands_twice():
    file = parse(Source("a", "effspec 1 model a = made(s: {b: 1, a: 2%, b: c})")).file
    data = file_to_json(file)
    shares = data["statements"][0]["call"]["args"][0]["value"]
    assert [e["name"] for e in shares["entries"]] == ["b", "a", "b"] and shares["entries"][0]["value"]["digits"] == "1"
    assert file_from_json(json.loads(json.dumps(data))) == file


HEADER = '''
class Cut(Pass):
    """Cut."""
    split: Shares | None = param("How it is split.", of=("blocks", "channels"), default=None)
    order: Shares = param("What goes first.", of=("blocks", "channels"), default=Shares((("blocks", 2.0),)))
'''


def test_a_pass_declares_shares_by_type_and_names(tmp_path):
    path = tmp_path / "cut.py"
    path.write_text(HEADER, encoding="utf-8")
    split, order = read_plugin_header("pass", "cut", path).params
    assert (split.types, split.of, split.default) == (("shares",), ("blocks", "channels"), None)
    assert order.default == Shares((("blocks", 2.0),)) and validate_or_report(
        order.default, order, None, lambda fault: None
    )
    path.write_text(HEADER.replace('of=("blocks", "channels"), ', ""), encoding="utf-8")
    with pytest.raises(AssertionError, match="`split` divides among its `of`"):
        read_plugin_header("pass", "cut", path)


def test_the_page_of_a_pass_shows_the_names_and_how_shares_are_written():
    page = explain_page("prune.multi")
    assert (
        "split: a set of shares for blocks, channels and heads, like `{blocks: 3, channels: 2, heads: 1}`, default none"
    ) in page
