"""`effc tune` from a wish to an artifact, on the embedded model."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from effc.compiler.cli.main import main

from .test_wish import written

pytestmark = pytest.mark.slow
NARROW = ', among: ["int8", "int4"]'


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted((folder / "native").rglob("*")) if f.is_file()}


def tuned(file: Path, out: Path, cache: Path, *more: str) -> int:
    return main(["tune", str(file), "-o", str(out), "--cache-dir", str(cache), "--threads", "1", *more])


def test_the_smallest_format_within_the_bound_is_chosen_and_its_recipe_compiles_to_the_same_bytes(tmp_path, capsys):
    file = written(tmp_path, optimize="bytes", more=NARROW)
    assert tuned(file, tmp_path / "out", tmp_path / "cache", "--format", "json") == 0
    answer = json.loads(capsys.readouterr().out)
    ratios = {c["name"]: c["ratios"] for c in answer["candidates"]}
    assert answer["chosen"] == min(ratios, key=lambda name: ratios[name]["bytes"]), ratios
    (artifact,) = answer["artifacts"]
    assert (artifact["path"], artifact["candidate"]) == (str(tmp_path / "out" / "fast"), answer["chosen"])
    assert {e["outcome"] for e in artifact["expectations"]} == {"holds"} and artifact["measures"], artifact
    (chosen,) = (c for c in answer["candidates"] if c["name"] == answer["chosen"])
    assert chosen["values"]["bytes"][0] / chosen["values"]["bytes"][1] == chosen["ratios"]["bytes"] < 1
    recipe = tmp_path / "w-tuned.effspec"
    assert "search.steps" not in recipe.read_text()
    page = (tmp_path / "w-tuned.html").read_text()
    assert answer["chosen"] in page and "<svg" in page and "prune" not in page
    assert "the compiled artifact was measured again" in page, "two figures of one candidate, and neither says why"
    again = [
        "compile",
        str(recipe),
        "-o",
        str(tmp_path / "again"),
        "--cache-dir",
        str(tmp_path / "other"),
        "--threads",
        "1",
    ]
    assert main(again) == 0
    assert files_of(tmp_path / "again" / "fast") == files_of(tmp_path / "out" / "fast")


def test_a_front_of_formats_is_compiled_point_by_point_and_each_recipe_compiles_to_the_same_bytes(tmp_path, capsys):
    file, out = written(tmp_path, optimize="bytes, against: divergence(dev)", more=NARROW), tmp_path / "out"
    file.write_text(file.read_text() + "expect fast { bytes >= 1KB }\n")
    assert tuned(file, out, tmp_path / "cache", "--format", "json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [d["slug"] for d in answer["diagnostics"]] == ["worse-side"], "each point's recipe repeats the warning"
    ratios = {c["name"]: tuple(c["ratios"].values()) for c in answer["candidates"]}
    points = [ratios[point["name"]] for point in answer["front"]]
    assert len(points) > 1 and points == sorted(points), points
    assert [p[1] for p in points] == sorted((p[1] for p in points), reverse=True), points
    assert {c["name"] for c in answer["candidates"] if c["state"] == "chosen"} == {p["name"] for p in answer["front"]}
    assert len(list(out.iterdir())) == len(points)
    page = (tmp_path / "w-tuned.html").read_text()
    assert all(f"<h3>{point['name']}</h3>" in page for point in answer["front"])
    recipe = answer["front"][-1]["recipe"]
    more = ["--cache-dir", str(tmp_path / "other"), "--threads", "1"]
    assert main(["compile", recipe, "-o", str(tmp_path / "again"), *more]) == 0
    (again,) = (tmp_path / "again").iterdir()
    assert files_of(again) == files_of(out / again.name)
    assert tuned(file, out, tmp_path / "cache") == 0, "what the search wrote is in its way"
    capsys.readouterr()


def test_the_report_that_a_search_wrote_is_replaced_when_it_runs_again(tmp_path, capsys):
    target = 'native("fast") report("page.html")'
    file, out = written(tmp_path, optimize="bytes", target=target, more=', among: ["int8"]'), tmp_path / "out"
    for _ in range(2):
        assert tuned(file, out, tmp_path / "cache") == 0
    (out / "page.html").write_text("somebody's")
    assert tuned(file, out, tmp_path / "cache") == 2
    assert "output-exists" in capsys.readouterr().err and (out / "page.html").read_text() == "somebody's"


def test_another_candidate_is_compiled_by_its_name(tmp_path, capsys):
    file = written(tmp_path, optimize="bytes", more=NARROW)
    assert tuned(file, tmp_path / "out", tmp_path / "cache", "--candidate", "int8", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["chosen"] == "int8"
    assert "weights: int8)" in (tmp_path / "w-tuned.effspec").read_text()
    assert tuned(file, tmp_path / "other", tmp_path / "cache", "--candidate", "int9") == 2
    assert "did you mean `int8`?" in capsys.readouterr().err


def test_without_the_packages_of_the_page_all_else_is_there_and_the_same_command_runs_again(
    tmp_path, capsys, monkeypatch
):
    file, find_spec = written(tmp_path, optimize="bytes", more=NARROW), importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "vl_convert" else find_spec(n, *a))
        assert tuned(file, tmp_path / "out", tmp_path / "cache") == 0
    captured = capsys.readouterr()
    assert "chosen" in captured.out and "no page was written: a report needs vl_convert" in captured.err
    page = tmp_path / "w-tuned.html"
    assert not page.exists()
    page.mkdir()  # in its way
    assert tuned(file, tmp_path / "out", tmp_path / "cache") == 0
    captured = capsys.readouterr()
    assert "chosen" in captured.out and "no page was written: " in captured.err and str(page) in captured.err
    page.rmdir()
    assert tuned(file, tmp_path / "out", tmp_path / "cache") == 0
    assert page.exists()
    page.write_text("somebody's notes")
    assert tuned(file, tmp_path / "out", tmp_path / "cache") == 2 and page.read_text() == "somebody's notes"


def test_where_nothing_keeps_the_bounds_the_nearest_are_listed_and_nothing_is_written(tmp_path, capsys):
    file = written(tmp_path, optimize="bytes", bounds="perplexity(text.heldout) <= 0.5 * base", more=NARROW)
    assert tuned(file, tmp_path / "out", tmp_path / "cache") == 4
    captured = capsys.readouterr()
    assert "wish-unmet" in captured.err and "nearest: " in captured.err and "default format" in captured.out
    assert "misses `perplexity(dev) <= 0.5 * base`: " in captured.out  # the rows that were read
    assert not (tmp_path / "w-tuned.effspec").exists() and not (tmp_path / "out").exists()


def test_a_candidate_that_gives_no_numbers_is_refused_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    from effc.compiler.driver.tuning import trials
    from effc.dsl.syntax.diagnostics import Fault, Reject

    measure, not_finite, models = trials.measure_score, Fault("not-finite-here", "Logits are no numbers."), []

    def measure_score(metric, model, ctx):
        if not any(model is known for known in models):
            models.append(model)
        if len(models) > 2 and model is models[2]:  # after the original and the unchanged one
            raise Reject(not_finite("logits are no numbers"))
        return measure(metric, model, ctx)

    monkeypatch.setattr(trials, "measure_score", measure_score)
    file = written(tmp_path, optimize="bytes", more=NARROW)
    assert tuned(file, tmp_path / "out", tmp_path / "cache", "--format", "json") == 0
    states = [c["state"] for c in json.loads(capsys.readouterr().out)["candidates"]]
    assert states.count("refused: logits are no numbers") == 1 and states.count("chosen") == 1


def test_another_pipeline_of_the_recipe_is_left_alone(tmp_path, capsys):
    file = written(tmp_path, optimize="bytes", more=NARROW)
    other = 'pipeline other(base) {}\nexpect other { params <= 0.5 * base }\nemit other { hf("other") }\n'
    file.write_text(file.read_text() + other)
    assert tuned(file, tmp_path / "out", tmp_path / "cache") == 0
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["fast"]
    assert "other" in (tmp_path / "w-tuned.effspec").read_text()
    capsys.readouterr()


def test_an_interrupt_leaves_the_recipe_of_the_best_so_far_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    from effc.compiler.driver.tuning.search import Search
    from effc.compiler.driver.tuning.trials import Trials

    file, measure = written(tmp_path, optimize="bytes", more=NARROW), Trials.measure

    def interrupted(self, plans, rows):
        if rows == 0:
            raise KeyboardInterrupt
        return measure(self, plans, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trials, "measure", interrupted)
        assert tuned(file, tmp_path / "out", tmp_path / "cache") == 130
    recipe = tmp_path / "w-tuned.effspec"
    assert "weights: int4" in recipe.read_text() and "best so far" in capsys.readouterr().err
    assert tuned(file, tmp_path / "out", tmp_path / "cache") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Search, "best", property(lambda self: self.candidates[1]))
        patch.setattr(Search, "_measure_finalists", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert tuned(file, tmp_path / "out", tmp_path / "cache") == 130
    assert tuned(file, tmp_path / "out", tmp_path / "cache") == 0, "what an interrupt left is in the way"


def test_a_search_that_is_killed_goes_on_and_chooses_what_it_would_have_chosen(tmp_path, capsys):
    file = written(tmp_path, optimize="bytes", more=NARROW)
    code = "import sys; from effc.compiler.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "tune", str(file), "-o", str(tmp_path / "out"), "--threads", "1"]
    values = tmp_path / "cache" / "values"
    process = subprocess.Popen([*command, "--cache-dir", str(tmp_path / "cache")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not any(b'"tune"' in f.read_bytes() for f in values.glob("*.json")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert not (tmp_path / "w-tuned.effspec").exists(), "it ended before it was killed"
    assert tuned(file, tmp_path / "out", tmp_path / "cache") == 0
    resumed = (tmp_path / "w-tuned.effspec").read_bytes()
    assert tuned(file, tmp_path / "straight", tmp_path / "new-cache", "--force") == 0
    assert (tmp_path / "w-tuned.effspec").read_bytes() == resumed
    capsys.readouterr()
