"""`effc test` holds what is measured against the baseline that lies beside the recipe."""

import json
import shutil
from xml.etree import ElementTree

import pytest
from effc.compiler.cli.main import main

from .conftest import recipe_text

EXPECT = "expect small {\n  params <= 0.99 * base\n  perplexity(data: heldout) <= 9 * base\n}\n"
TIME = {"metric": "decode.p50", "unit": "", "value": 1.0, "better": "lower", "clocked": True}


@pytest.fixture(scope="module")
def blessed(tmp_path_factory):
    """A recipe, its artifact, and the baseline that was written of it."""
    folder = tmp_path_factory.mktemp("blessed")
    steps = "  thin = prune.channels(keep: 75% of channels, align: 32)"
    (folder / "r.effspec").write_text(recipe_text(steps, EXPECT), encoding="utf-8")
    cache = str(folder / "cache")
    quiet = ("-q", "--no-progress", "--cache-dir", cache)
    assert main(["compile", str(folder / "r.effspec"), "-o", str(folder / "out"), *quiet]) == 0
    assert main(["test", str(folder / "r.effspec"), "-o", str(folder / "out"), "--bless", *quiet]) == 0
    return folder


@pytest.fixture
def own(blessed, tmp_path):
    for name in ("r.effspec", "r.baseline.json"):
        shutil.copy(blessed / name, tmp_path / name)
    shutil.copytree(blessed / "out", tmp_path / "out")
    return tmp_path


def edit(folder, change):
    file = folder / "r.baseline.json"
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body))


@pytest.mark.slow
def test_on_the_same_machine_all_but_times_is_as_it_was(effc, own):
    def more(body):
        body["tolerance"].update(time=999.0)  # a busy machine is no news
        body["artifacts"][0]["measures"].append(TIME)

    edit(own, more)
    run = effc("test", "r.effspec", "--format", "json", "-q")
    body = json.loads(run.out)
    states = {d["metric"]: d["state"] for d in body["artifacts"][0]["baseline"]}
    assert run.code == 0 and states.pop("decode.p50") in ("moved", "better", "same")
    assert set(states) == {"params", "bytes", "perplexity(data: heldout)"} and set(states.values()) == {"same"}


def test_a_test_without_a_baseline_says_so(effc, own):
    (own / "r.baseline.json").unlink()
    run = effc("test", "r.effspec", "--no-progress")
    assert (
        run.code == 0 and "compared with no baseline: `effc test r.effspec --bless` writes r.baseline.json" in run.err
    )


def test_a_command_that_is_named_can_be_copied_whatever_the_recipe_is_called(effc, own):
    (own / "r.baseline.json").unlink()
    (own / "r.effspec").rename(own / "my r.effspec")
    run = effc("test", "my r.effspec", "--no-progress", "-o", "out")
    assert "`effc test 'my r.effspec' --bless`" in run.err


@pytest.mark.slow
def test_a_time_is_held_where_a_bound_reads_it(effc, own):
    kept = json.loads((own / "r.baseline.json").read_text())["artifacts"][0]["measures"]
    assert {m["metric"] for m in kept} == {"params", "bytes", "perplexity(data: heldout)"}
    held = json.loads(effc("test", "r.effspec", "-q", "--format", "json").out)["artifacts"][0]["baseline"]
    assert [d["metric"] for d in held if d["state"] == "same"] == [d["metric"] for d in held] != []
    file = own / "r.effspec"
    file.write_text(file.read_text().replace("expect small {", "expect small {\n  decode.p50 <= 999 * base"))
    assert effc("test", "r.effspec", "-q", "--bless", "--undecided", "pass").code == 0
    kept = json.loads((own / "r.baseline.json").read_text())["artifacts"][0]["measures"]
    assert [m["metric"] for m in kept if m["clocked"]] == ["decode.p50"]


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ("keep: 75%", "keep: 50%", "`thin` is another now"),
        ("  thin =", "  bald = prune.heads(keep: 50% of kv_heads)\n  thin =", "`bald` is another now"),
        ("  thin = prune.channels(keep: 75% of channels, align: 32)\n", "", "`thin` is gone"),
    ],
)
def test_an_artifact_of_other_steps_is_not_taken_for_the_recipes(effc, own, then, now, said):
    file = own / "r.effspec"
    changed = file.read_text().replace(then, now)
    assert changed != file.read_text()
    file.write_text(changed)
    run = effc("test", "r.effspec", "-q")
    assert run.code == 2 and "error[stale-artifact]" in run.err and said in run.err and "--force" in run.err


def lower(body):
    """As if the recipe had given a model of less perplexity, and more parameters, before."""
    body["tolerance"].update(time=9.0)
    for measure in body["artifacts"][0]["measures"]:
        measure["value"] *= {"params": 1.1, "perplexity(data: heldout)": 0.9999}.get(measure["metric"], 1)


@pytest.mark.slow
def test_a_measure_that_is_worse_fails_on_the_line_of_its_bound(effc, own, monkeypatch):
    edit(own, lower)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(own / "summary.md"))
    run = effc("test", "r.effspec", "--format", "github", "-q", "--report", "r.xml", "--report", "r.json")
    assert run.code == 4
    line = next(
        n for n, text in enumerate((own / "r.effspec").read_text().splitlines(), 1) if "perplexity(data" in text
    )
    assert f"::error file=r.effspec,line={line},col=3," in run.out and "baseline-missed" in run.out
    assert "| **worse** |" in (own / "summary.md").read_text()
    suite = ElementTree.parse(own / "r.xml").getroot()
    assert suite.get("failures") == "1" and suite.find(".//failure/..").get("line") == str(line)
    slugs = [d["slug"] for d in json.loads((own / "r.json").read_text())["diagnostics"]]
    assert [slug for slug in slugs if slug != "bound-uncertain"] == ["baseline-missed"]
    assert "`perplexity(data: heldout)` was" in run.out and "ratio of `perplexity" not in run.out
    text = effc("test", "r.effspec", "--no-progress")
    assert text.code == 4 and "  worse      perplexity(data: heldout)" in text.out
    assert (
        "measure worse than the baseline" in text.err
        and "better than the baseline" in text.err
        and "error[baseline-missed]" in text.err
    )


@pytest.mark.slow
def test_counts_that_differ_by_little_are_told_with_all_their_digits(effc, own):
    def less(body):
        for measure in body["artifacts"][0]["measures"]:
            measure["value"] -= measure["metric"] == "params"

    edit(own, less)
    run = effc("test", "r.effspec", "--no-progress", "-q")
    then = next(m for m in json.loads((own / "r.baseline.json").read_text())["artifacts"][0]["measures"])["value"]
    assert run.code == 4 and f"`params` was {then:,.0f} and is {then + 1:,.0f}" in run.err
    assert f"{then + 1:,.0f} against {then:,.0f}" in run.out


@pytest.mark.slow
def test_a_measure_that_nothing_measures_any_more_is_warned_of(effc, own):
    edit(own, lambda body: body["artifacts"][0]["measures"][0].update(metric="flops"))
    run = effc("test", "r.effspec", "--no-progress")
    assert run.code == 0 and "warning[baseline-gone]: `flops` stands in the baseline" in run.err


@pytest.mark.heavy
def test_elsewhere_quality_may_move_a_little_and_times_are_left_out(effc, own):
    def elsewhere(body):
        body["machine"].update(isa="other", torch="1.0")
        body["artifacts"][0]["measures"].append(TIME)
        for measure in body["artifacts"][0]["measures"]:
            measure["value"] *= 0.995 if measure["metric"].startswith("perplexity") else 1

    edit(own, elsewhere)
    run = effc("test", "out/small", "--format", "json", "-q")
    states = {d["metric"]: d["state"] for d in json.loads(run.out)["artifacts"][0]["baseline"]}
    assert run.code == 0 and states["perplexity(data: heldout)"] == "moved" and states["decode.p50"] == "elsewhere"


def other_model(body):
    body["artifacts"][0]["inputs"]["model"] = "0" * 64


def other_data(body):
    body["artifacts"][0]["inputs"]["data heldout"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: body.update(recipe="s.effspec"), "was written for s.effspec, not for r.effspec"),
        (
            lambda body: body["artifacts"][0].update(pipeline="big"),
            "the baseline has no artifact `small` of pipeline `small`",
        ),
        (other_model, "model is another than when the baseline was written"),
        (other_data, "data heldout is another than when the baseline was written"),
    ],
)
def test_a_baseline_of_another_recipe_is_refused(effc, own, change, said):
    edit(own, change)
    run = effc("test", "r.effspec", "-q")
    assert run.code == 2 and "error[foreign-baseline]" in run.err and said in run.err


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("tolerance"),
        lambda body: body.update(format=2),
        lambda body: body["tolerance"].update(time=-1),
        lambda body: body["tolerance"].update(quality=float("nan")),
        lambda body: body.update(artifacts=[1]),
        lambda body: body["artifacts"][0]["measures"][0].update(metric="a\x1b[31m"),
        lambda body: body["artifacts"][0]["measures"][0].update(clocked="no"),
        lambda body: body["artifacts"][0]["measures"][0].update(value=-1),
    ],
)
def test_what_is_no_baseline_is_refused_before_numbers_are_compared(effc, own, change):
    edit(own, change)
    run = effc("test", "r.effspec", "-q")
    assert run.code == 2 and "error[broken-baseline]" in run.err


def test_what_is_no_json_or_no_file_is_refused(effc, own):
    for text, said in (("{}", "it has no `format`"), ("[]", "a part is of another form")):
        (own / "r.baseline.json").write_text(text)
        assert f"r.baseline.json is no baseline: {said}" in effc("test", "r.effspec", "-q").err
    (own / "r.baseline.json").write_text("[" * 100_000)
    assert "error[broken-baseline]" in effc("test", "r.effspec", "-q").err
    (own / "r.baseline.json").unlink()
    (own / "r.baseline.json").symlink_to("/dev/zero")
    assert "error[odd-file]" in effc("test", "r.effspec", "-q").err


@pytest.mark.parametrize("text", ["{", "{}", '{"format": 2}'])
def test_a_broken_baseline_is_told_before_anything_else_is_looked_at(effc, own, text, monkeypatch):
    shutil.rmtree(own / "out")  # so that nothing could be measured
    monkeypatch.setattr("effc.compiler.analysis.planning.plan.plan_pipeline", None)  # nor planned
    (own / "r.baseline.json").write_text(text)
    run = effc("test", "r.effspec")
    assert run.code == 2 and "error[broken-baseline]" in run.err


@pytest.mark.slow
def test_a_missed_bound_is_not_blessed(effc, own):
    text = (own / "r.effspec").read_text().replace("0.99 * base", "0.1 * base")
    (own / "r.effspec").write_text(text)
    before = (own / "r.baseline.json").read_bytes()
    run = effc("test", "r.effspec", "--bless", "-q")
    assert run.code == 4 and "error[nothing-blessed]" in run.err
    assert (own / "r.baseline.json").read_bytes() == before
    assert effc("test", "out/small", "--bless").code == 2
    assert effc("test", "r.effspec", "--report", "r.pdf").code == 2


@pytest.mark.parametrize(
    ("name", "said"), [("r.csv", "ends in none of .json, .xml, .md"), ("away/r.xml", "there is no folder away")]
)
def test_a_report_that_can_not_be_written_is_refused_before_anything_is_measured(effc, tmp_path, name, said):
    run = effc("test", "r.effspec", "--report", name)
    assert run.code == 2 and said in " ".join(run.err.replace("│", " ").split())
