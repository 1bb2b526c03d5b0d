"""What the checker makes of recipes beyond the manual: values, branches, modules, variants, promises of its API."""

import resource
import subprocess
import sys
import time

import pytest
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.check import Checked, check_recipe_file
from effc.dsl.checker.overrides import read_overrides
from effc.dsl.checker.rules import Rules
from effc.dsl.checker.values import Bytes, DataRef, Duration, MetricRef, Range, Ratio, Selector, StepRef
from effc.dsl.checker.vocabulary import Param, Vocabulary, Word
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.source import Source
from hypothesis import given
from hypothesis import strategies as st

ON = Param("on", ("selector",), "Where.", None)
DATA = Param("data", ("data",), "Rows.", positional=True)


class Cut(Rules):
    def effects(self):
        yield "uneven widths"


class Files(Rules):
    def cannot_hold(self):
        return {"holes": "no file has holes"}


WORDS = {
    "pass": [
        Word(
            "pass",
            "cut",
            "Cut.",
            (
                Param("keep", ("ratio",), "Share.", of=("channels", "params"), gt=0, le=1),
                ON,
                Param("align", ("int",), "Step.", 1, ge=1),
            ),
            declare=lambda **arguments: Cut(),
        ),
        Word(
            "pass",
            "tune",
            "Tune.",
            (
                Param("lr", ("float",), "Rate.", 1e-3, gt=0),
                Param("data", ("data",), "Rows."),
                Param("ranks", ("list[int]",), "Ranks.", (8,), ge=1),
            ),
            {"after": {"cut": "widths change what is tuned"}},
        ),
        Word(
            "pass",
            "learn",
            "Learn.",
            (
                Param("teacher", ("step", "model"), "From whom."),
                Param("time", ("duration",), "How long.", None),
                Param("memory", ("bytes",), "How much.", None),
                Param("sizes", ("range",), "Which.", None),
                Param("score", ("metric", "choice"), "By what.", None, choices=("loss",)),
                Param("label", ("string",), "Name.", ""),
            ),
        ),
    ],
    "target": [
        Word(
            "target",
            "files",
            "Files.",
            (Param("path", ("string",), "Where.", positional=True),),
            declare=lambda **arguments: Files(),
        )
    ],
    "metric": [
        Word("metric", "loss", "Loss.", (DATA, Param("stride", ("int",), "Step.", 512))),
        Word("metric", "wait", "Wait.", (), {"unit": "ms"}),
        Word("metric", "size", "Size.", (), {"unit": "B"}),
        Word("metric", "count", "Count.", ()),
    ],
    "data": [
        Word(
            "data",
            "text",
            "Text.",
            (Param("path", ("string",), "File.", positional=True), Param("rows", ("int",), "Rows.", 4)),
        )
    ],
    "model": [Word("model", "zoo", "Zoo.", (Param("name", ("string",), "Name.", positional=True),))],
}
VOCABULARY = Vocabulary({kind: {w.name: w for w in words} for kind, words in WORDS.items()})
FRAME = """effspec 1
model base = zoo("a")
data calib = text("calib.txt")
{top}
pipeline main(base) {{
{steps}
}}
expect main {{ loss(calib) <= 2 {bounds} }}
emit main {{ files("out") {emits} }}
"""


def checked(text: str, library=lambda _: None, **overrides) -> Checked:
    parsed = parse(Source("main.effspec", text))
    assert parsed.diagnostics == ()
    return check_recipe_file(parsed.file, VOCABULARY, overrides=read_overrides(**overrides), read_module=library)


def framed(steps: str = "  thin = cut(keep: 50% of channels)", top="", bounds="", emits="", **more) -> Checked:
    return checked(FRAME.format(steps=steps, top=top, bounds=bounds, emits=emits), **more)


def recipe(*args, **more):
    found = framed(*args, **more)
    assert found.diagnostics == ()
    return found.recipes[0]


def slugs(found: Checked) -> list[str]:
    assert found.recipes == () or not found.errors
    return [d.slug for d in found.diagnostics]


def step(text: str, **more):
    return recipe(f"  s = {text}", **more).pipelines["main"].steps[-1].call.args


def test_defaults_are_filled_in_and_positions_have_names():
    made = recipe()
    assert made.models["base"].args == {"name": "a"}
    assert made.data["calib"].args == {"path": "calib.txt", "rows": 4}
    assert made.pipelines["main"].steps[0].call.args == {"keep": Ratio(0.5, "channels"), "on": None, "align": 1}
    assert made.pipelines["main"].emits[0].source == "thin"


def test_every_type_has_a_value():
    args = step('learn(teacher: base, time: 90s, memory: 1.5GiB, sizes: 1..8, score: loss(calib), label: "x")')
    assert (args["time"], args["memory"], args["sizes"]) == (Duration(90.0), Bytes(3 * 2**29), Range(1, 8))
    assert args["score"] == MetricRef("loss", (("data", DataRef("calib")),))
    assert step("tune(lr: 1, data: calib, ranks: [8, 16])")["ranks"] == (8, 16)
    assert step('cut(keep: 5% of params, on: "a.*" | "b" - "a.c")')["on"] == Selector(
        (("|", "a.*"), ("|", "b"), ("-", "a.c"))
    )


def test_a_metric_is_the_same_however_its_defaults_are_written():
    metrics = {
        step(f"learn(teacher: base, score: {m})")["score"]
        for m in ("loss(calib)", "loss(data: calib)", "loss(calib, stride: 512)")
    }
    assert len(metrics) == 1
    assert step("learn(teacher: base, score: loss)")["score"] == "loss"  # a choice wins over a metric


def test_a_step_works_on_the_one_before_unless_it_says_from():
    made = recipe("  a = cut(keep: 5% of params)\n  b = learn(teacher: a)\n  c = learn(from: base, teacher: b)")
    assert [s.source for s in made.pipelines["main"].steps] == ["base", "a", "base"]
    assert made.pipelines["main"].steps[1].call.args["teacher"] == StepRef("a")


@pytest.mark.parametrize(
    "bound, limit, baseline",
    [
        ("wait <= 30ms", Duration(0.03), None),
        ("size <= 24GiB", Bytes(24 * 2**30), None),
        ("count <= 0.8B", 8e8, None),
        ("count in 1..2.5", Range(1.0, 2.5), None),
        ("wait <= 80% * base", 0.8, "base"),
        ("loss(calib) <= 1.15 * base", 1.15, "base"),
    ],
)
def test_limits_have_the_unit_of_their_metric(bound, limit, baseline):
    found = recipe(bounds=bound).pipelines["main"].expects[1]
    assert (found.limit, found.baseline) == (limit, baseline)


@pytest.mark.parametrize(
    "bound, slug",
    [
        ("wait <= 30", "wrong-unit"),
        ("size <= 30ms", "wrong-unit"),
        ("count <= 80%", "wrong-unit"),
        ("wait <= 30ms * base", "wrong-unit"),
        ("count <= 2 * calib", "wrong-type"),
        ("cont <= 2", "unknown-word"),
        ("count <= 2 on base", "wrong-type"),
        ("count <= calib", "wrong-type"),
    ],
)
def test_limits_of_another_unit_are_refused(bound, slug):
    assert slugs(framed(bounds=bound)) == [slug]


def test_the_order_that_headers_ask_for_is_checked_along_every_branch():
    late = framed("  a = tune(data: calib)\n  b = cut(keep: 5% of params)")
    assert slugs(late) == ["wrong-order"]
    assert late.diagnostics[0].note == "widths change what is tuned"
    apart = framed("  a = tune(data: calib)\n  b = cut(from: base, keep: 5% of params)", emits='files("a", from: a)')
    assert slugs(apart) == []


def test_params_stand_wherever_a_value_of_their_type_may():
    top = (
        'param keep: ratio = 50%\nparam at: selector = "a" | "b"\nparam n: int = 4\n'
        "param limit: float = 1.5\nparam rank: int = 8"
    )
    made = recipe(
        "  a = cut(keep: keep of channels, on: at, align: n)\n  b = learn(teacher: base, sizes: 1..n)\n"
        "  c = tune(lr: n, data: calib, ranks: [rank, 16])",
        top=top,
        bounds="count <= limit * base",
    )
    a, b, c = (s.call.args for s in made.pipelines["main"].steps)
    assert (a["keep"], a["on"].terms[1], a["align"]) == (Ratio(0.5, "channels"), ("|", "b"), 4)
    assert (b["sizes"], c["lr"], c["ranks"]) == (Range(1, 4), 4.0, (8, 16))
    assert made.pipelines["main"].expects[1].limit == 1.5
    assert slugs(framed("  a = cut(keep: 5% of params, align: x)", top='param x: string = "4"')) == ["wrong-type"]


def test_the_strongest_override_wins():
    top, steps = "param keep: ratio = 50%\nparam n: int = 1", "  a = cut(keep: keep of channels, align: n)"
    file = Source("params.json", '{"keep": "60%", "n": 2}')
    environment = {"EFFC_PARAM_keep": "70%", "HOME": "x"}
    for sources, keep, origin in (
        ({}, 0.5, "recipe"),
        ({"params_source": file}, 0.6, "params.json"),
        ({"params_source": file, "environment": environment}, 0.7, "EFFC_PARAM_keep"),
        ({"params_source": file, "environment": environment, "set_options": ["keep=80%"]}, 0.8, "--set"),
    ):
        made = recipe(steps, top=top, **sources)
        assert (made.params["keep"], made.origins["keep"]) == (Ratio(keep), origin)
    assert made.params["n"] == 2


@pytest.mark.parametrize(
    "given, slug",
    [
        ({"set_options": ["kep=1%"]}, "unknown-override"),
        ({"set_options": ["keep"]}, "bad-override"),
        ({"set_options": ["keep=1GiB"]}, "unfit-override"),
        ({"environment": {"EFFC_PARAM_kee": "1%"}}, "unknown-override"),
        ({"set_options": ["keep=99%"]}, "unfit-override"),
        ({"params_source": Source("p", "[1]")}, "bad-override"),
        ({"params_source": Source("p", '{"keep": {}}')}, "bad-override"),
        ({"params_source": Source("p", "{")}, "bad-override"),
    ],
)
def test_a_mistake_of_the_command_line_ends_with_its_exit_code(given, slug):
    found = framed("  a = cut(keep: keep of channels)", top="param keep: ratio = 50% in 10%..90%", **given)
    assert slugs(found) == [slug] and found.diagnostics[0].exit == 2


def test_a_matrix_makes_a_recipe_of_each_combination_and_overrides_are_not_varied():
    top = "param keep: ratio = 50%\nparam n: int = 1\nmatrix { keep: [80%, 90%] n: [1, 2] }"
    steps = "  a = cut(keep: keep of channels, align: n)"
    names = [r.variant for r in framed(steps, top=top).recipes]
    assert names == ["keep=80%,n=1", "keep=80%,n=2", "keep=90%,n=1", "keep=90%,n=2"]
    fixed = framed(steps, top=top, set_options=["keep=75%"]).recipes
    assert [(r.variant, r.params["keep"]) for r in fixed] == [("n=1", Ratio(0.75)), ("n=2", Ratio(0.75))]


def test_a_recipe_with_an_error_has_no_variants_but_all_its_faults():
    found = framed("  a = cut(keep: 5, on: 3)\n  b = cot(x: calib)\n  c = tune(data: calb, lr: 0)")
    assert found.recipes == ()
    assert slugs(found) == ["wrong-unit", "wrong-type", "unknown-word", "unknown-name", "out-of-range"]
    assert [d.span.start for d in found.diagnostics] == sorted(d.span.start for d in found.diagnostics)


def test_models_without_a_skeleton_are_named():
    assert framed().unresolved == ("base",)


@given(st.text(alphabet='abc(){}[]:=,.%|-&*<>"# \n123', max_size=80))
def test_no_text_makes_the_checker_crash(text):
    parsed = parse(Source("main.effspec", FRAME.format(steps=text, top="", bounds="", emits="")))
    check_recipe_file(parsed.file, VOCABULARY)


@given(
    st.lists(
        st.sampled_from(
            [
                "param n: int = 4",
                "param n: ratio = n",
                "data calib = text(calib)",
                "model base = zoo(base)",
                "use std.x",
                "matrix n: [1, n]",
                "pipeline main(main) { a = a() }",
                "expect main { n <= n * n on n }",
                "emit main { files(n) }",
                "pipeline p(base) { a = cut(from: b) b = mine.x(n) n = learn(teacher: n) }",
                "profile n { isa: n n: 1..n }",
                'use "./main.effspec" as x',
                "emit p { files(from: a, from: b) }",
                'param s: selector = "a" - n',
            ]
        ),
        max_size=6,
    )
)
def test_no_order_of_statements_makes_the_checker_crash(statements):
    parsed = parse(Source("main.effspec", "effspec 1\n" + "\n".join(statements)))
    check_recipe_file(parsed.file, VOCABULARY)


@pytest.mark.parametrize("bound", ["bytes <= 24 GiB in hf", "decode.p50 <= 30 ms in native", "bytes <= 24 GiB"])
def test_a_unit_apart_from_its_number_is_joined_whatever_the_bound_goes_on_with(bound):
    text = f'effspec 1\nmodel m = zoo("x")\npipeline p(m) {{ s = prune.heads(keep: 1) }}\nexpect p {{ {bound} }}\n'
    parsed = parse(Source("r.effspec", text))
    found = [*parsed.diagnostics, *check_recipe_file(parsed.file, Registry().vocabulary).diagnostics]
    (apart,) = [d for d in found if d.slug == "wrong-sign"]
    number, unit = bound.split()[2:4]
    assert apart.help == f"write `{number}{unit}`" and apart.span.text == f"{number} {unit}"
    assert not any(d.slug == "unknown-word" and unit in d.message for d in found)


@pytest.mark.parametrize(
    "first, second, contradicts",
    [
        ("size < 3MB", "size >= 3MB", True),
        ("size <= 3MB", "size > 3MB", True),
        ("count in 1..2", "count > 2", True),
        ("count == 2", "count < 2", True),
        ("count == 2", "count == 3", True),
        ("size <= 3MB", "size >= 3MB", False),
        ("count in 1..2", "count >= 2", False),
        ("count > 2", "count < 3", False),
        ("wait <= 0.9 * base", "wait >= 2ms", False),
    ],
)
def test_bounds_contradict_where_no_value_keeps_both_whatever_end_is_open(first, second, contradicts):
    for bounds in (f"{first} {second}", f"{second} {first}"):
        faults = framed(bounds=bounds).diagnostics
        assert [d.slug for d in faults] == ["contradicting-bounds"] * contradicts
        if contradicts:
            assert {faults[0].span.text, faults[0].related[0][0].text} == {first, second}


def test_bounds_are_compared_in_one_pass_and_at_most_fifty_contradictions_reported():
    half = 2000
    keeps = "\n".join(f"count <= {2 * half + i} count >= {i}" for i in range(half))
    started = time.process_time()
    assert framed(bounds=keeps).diagnostics == ()
    faults = framed(bounds="\n".join(["count <= 1"] * half + ["count >= 2"] * half)).diagnostics
    assert [d.slug for d in faults] == ["contradicting-bounds"] * 50
    assert time.process_time() - started < 10  # pairs of these take a minute


def test_checking_imports_no_torch_and_takes_little_time():
    text = (
        FRAME.format(
            steps="\n".join(f"  s{i} = prune.channels(keep: 9{i}% of params)" for i in range(9)),
            top="",
            bounds="",
            emits="",
        )
        .replace("loss(calib)", "perplexity(calib)")
        .replace("files", "hf")
    )
    text = text.replace('text("calib.txt")', 'text("calib.txt", length: 8)')
    code = (
        "import sys; from effc.dsl.syntax.source import Source; from effc.dsl.syntax.parse import parse; "
        "from effc.compiler.plugin.registry import Registry; from effc.dsl.checker.check import check_recipe_file; "
        f"found = check_recipe_file(parse(Source('a', {text!r})).file, Registry().vocabulary); "
        "assert found.recipes, found.diagnostics; sys.exit('torch' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2  # 0.3 s where nothing slows it


def test_a_string_where_a_name_or_a_word_is_meant_gets_a_help_line():
    for call in ('tune(data: "calib.txt")', 'learn(teacher: "base")', 'learn(teacher: base, score: "2:4")'):
        (fault,) = framed(f"  a = {call}").diagnostics
        assert fault.slug in ("wrong-type", "unknown-choice") and fault.help, fault


def test_an_unknown_name_where_a_list_is_meant_is_a_mistake_of_the_user():
    (fault,) = framed("  a = tune(data: calib, ranks: nope)").diagnostics
    assert fault.slug == "unknown-name" and "`nope`" in fault.message


SHARE = "write `count <= 1.02 * base` for a share of the original's"
TIMES = [("1h30min", "write `90min`"), ("2hours", "write `2h`"), ("90m", "write `90min` for minutes, or `90M` for")]


@pytest.mark.parametrize("limit, remedy", [("1.02%", SHARE), ("102%", SHARE), *TIMES, ("1h30apples", "units: %")])
def test_a_share_or_a_time_that_is_misspelt_gets_its_right_spelling(limit, remedy):
    (fault,) = framed(bounds=f"count <= {limit}").diagnostics
    assert fault.help.startswith(remedy), fault
