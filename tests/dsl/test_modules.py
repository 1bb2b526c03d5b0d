"""Modules in a recipe: their pipelines are called like passes, their names, faults and paths are their own."""

import time

from effc.dsl.checker.values import DataRef, MetricRef, Ratio, StepRef
from effc.dsl.syntax.source import Source

from tests.dsl.test_check import framed, slugs

MODULE = """effspec 1
param keep: ratio = 75%
param rows: int = 4
model own = zoo("b")
data words = text("words.txt", rows: rows)
pipeline slimming(own) {
  a = cut(keep: keep of channels)
  b = learn(from: own, teacher: a, score: loss(words))
}
"""


def used(steps: str, module: str = MODULE, **more):
    texts = {"mine.effspec": Source("mine.effspec", module)}
    return framed(steps, top='use "./mine.effspec" as mine', library=texts.get, **more)


def test_a_modules_pipeline_is_called_like_a_pass():
    found = used("  s = cut(keep: 5% of params)\n  m = mine.slimming(keep: 60%)\n  t = learn(teacher: m)")
    assert found.diagnostics == ()
    steps = found.recipes[0].pipelines["main"].steps
    assert [(s.name, s.source) for s in steps] == [("s", "base"), ("m.a", "s"), ("m.b", "s"), ("t", "m.b")]
    assert steps[1].call.args["keep"] == Ratio(0.6, "channels")
    assert steps[2].call.args["score"].get("data") == DataRef("mine.words")
    assert steps[3].call.args["teacher"] == StepRef("m.b")
    assert set(found.recipes[0].data) == {"calib", "mine.words"}


def test_two_calls_with_other_params_have_data_of_their_own():
    found = used("  m = mine.slimming(rows: 8)\n  n = mine.slimming()")
    assert found.diagnostics == ()
    data = found.recipes[0].data
    assert {name: call.args["rows"] for name, call in data.items()} == {"calib": 4, "mine.words": 8, "n.words": 4}


def test_names_of_a_module_may_be_used_and_its_faults_lie_in_its_file():
    assert used("  s = learn(teacher: mine.own, score: loss(mine.words))").diagnostics == ()
    (fault,) = used("  m = mine.slimming()", MODULE.replace("teacher: a", "teacher: aa")).diagnostics
    assert (fault.slug, fault.span.source.name, fault.span.line) == ("unknown-name", "mine.effspec", 8)
    assert slugs(used("  m = mine.slimming(kep: 1%)")) == ["unknown-parameter"]
    assert slugs(used("  m = learn(teacher: mine.owm)")) == ["unknown-name"]
    assert slugs(used("  m = mine.sliming()")) == ["unknown-word"]


SCORED = """effspec 1
data words = text("words.txt")
param by: metric = loss(words)
param rows: data = words
model own = zoo("b")
pipeline fitted(own) {
  a = learn(teacher: own, score: by)
  b = tune(data: rows)
}
"""


def test_a_module_may_be_given_data_and_metrics_and_only_what_is_read_is_in_the_recipe():
    given = used("  m = mine.fitted(by: loss(calib, stride: 4), rows: calib)", SCORED)
    assert given.diagnostics == ()
    a, b = (s.call.args for s in given.recipes[0].pipelines["main"].steps)
    assert a["score"] == MetricRef("loss", (("data", DataRef("calib")), ("stride", 4)))
    assert b["data"] == DataRef("calib") and set(given.recipes[0].data) == {"calib"}
    bare = used("  m = mine.fitted()", SCORED)
    assert bare.recipes[0].pipelines["main"].steps[1].call.args["data"] == DataRef("mine.words")
    assert set(bare.recipes[0].data) == {"calib", "mine.words"} and bare.recipes[0].params == {}
    assert slugs(used("  m = mine.fitted(by: calib)", SCORED)) == ["wrong-type"]


def test_paths_of_a_module_start_beside_its_file():
    texts = {"lib/mine.effspec": Source("lib/mine.effspec", MODULE)}
    found = framed("  m = mine.slimming()", top='use "./lib/mine.effspec" as mine', library=texts.get)
    assert {name: call.folder for name, call in found.recipes[0].data.items()} == {"calib": "", "mine.words": "lib"}


def test_modules_that_use_the_next_one_twice_are_opened_so_often_and_no_more():
    """Thirty files, each of which uses the next one under two names: a thousand million modules."""

    def file(name: str) -> Source | None:
        number = int(name.removesuffix(".effspec").removeprefix("m"))
        below = "".join(f'use "./m{number + 1}.effspec" as {alias}\n' for alias in "ab") if number < 30 else ""
        return Source(name, f"effspec 1\n{below}")

    started = time.process_time()
    found = framed("  s = cut(keep: 5% of params)", top='use "./m1.effspec" as mine', library=file)
    assert slugs(found)[0] == "too-many-modules" and time.process_time() - started < 20
