"""`effc bisect` names the step that broke a bound, and the cut of it, from what the cache has."""

import json

import pytest
from effc.compiler.driver import api

from .conftest import recipe_text

pytestmark = pytest.mark.slow

STEPS = """  thin = prune.channels(keep: 94% of channels, align: 32)
  slim = prune.blocks(remove: {remove}, score: perplexity(calib))"""


def text(bound: str, remove: int = 3) -> str:
    return recipe_text(STEPS.format(remove=remove), f"expect small {{\n  {bound}\n  params <= 1 * base\n}}\n")


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Perplexity of the model with the channels gone, and with 1, 2, 3 branches gone, each from a pipeline of its own."""
    folder, found = tmp_path_factory.mktemp("values"), []
    for remove in (0, 1, 2, 3):
        body = text("perplexity(data: heldout) <= 1e9", max(remove, 1))
        if remove == 0:
            body = "\n".join(line for line in body.splitlines() if "slim =" not in line)
        (folder / "v.effspec").write_text(body + "\n")
        session = api.open_session(folder / "v.effspec", cache_dir=folder / "cache", threads=1)
        (plan,) = api.plan_all_pipelines(session)
        blame = api.bisect_bound(session, plan, plan.pipeline.expects[0])
        assert blame.diagnostics == []
        found.append(blame.looks[-1].verdict.value)
    return folder, found


def test_the_cut_is_the_one_after_which_a_shorter_search_misses_the_bound(effc, values, tmp_path):
    folder, (thin, *cuts) = values
    assert thin < cuts[0] < cuts[1] < cuts[2]
    (tmp_path / "r.effspec").write_text(text(f"perplexity(data: heldout) <= {(cuts[0] + cuts[1]) / 2}"))
    run = effc("bisect", "r.effspec", "--gate", "perplexity", "--format", "json", "-q", "--cache-dir", folder / "cache")
    body = json.loads(run.out)
    assert run.code == 4 and body["broken_by"] == "slim"
    assert [c["value"] for c in body["cuts"]] == pytest.approx(cuts[:2], rel=1e-5)  # masked, then cut: float32
    (found,) = body["diagnostics"]
    assert found["slug"] == "broken-by" and found["line"] == 10 and "cut 2 of 3 breaks it" in found["note"]


def test_a_step_without_cuts_is_named_alone(effc, values, tmp_path):
    folder, (thin, *_) = values
    (tmp_path / "r.effspec").write_text(text(f"perplexity(data: heldout) <= {thin * 0.999}", 1))
    run = effc("bisect", "r.effspec", "--gate", "perplexity", "--no-progress", "--cache-dir", folder / "cache")
    assert run.code == 4 and "`thin` breaks it" in run.err and "cut " not in run.out
    assert "the model" in run.out and "r.effspec:9:10" in run.err


def test_what_a_baseline_catches_is_bisected_where_the_bound_itself_holds(effc, values, tmp_path):
    folder, (thin, *cuts) = values
    (tmp_path / "r.effspec").write_text(text("perplexity(data: heldout) <= 1e9"))
    measure = {"metric": "perplexity(data: heldout)", "unit": "", "value": thin, "better": "lower", "clocked": False}
    entry = {"pipeline": "small", "variant": "", "artifact": "small", "inputs": {}, "measures": [measure]}
    body = {"format": 1, "recipe": "r.effspec", "machine": {}, "artifacts": [entry]}
    body["tolerance"] = {"quality": (cuts[0] / thin - 1) / 2, "time": 0.1}
    (tmp_path / "r.baseline.json").write_text(json.dumps(body))
    run = effc("bisect", "r.effspec", "--gate", "perplexity", "--format", "json", "-q", "--cache-dir", folder / "cache")
    told = json.loads(run.out)
    assert run.code == 4 and told["broken_by"] == "slim" and len(told["cuts"]) == 1
    (tmp_path / "r.baseline.json").write_text(json.dumps(body | {"tolerance": {"quality": 1e9, "time": 0.1}}))
    assert effc("bisect", "r.effspec", "--gate", "perplexity", "-q", "--cache-dir", folder / "cache").code == 0


def test_a_gate_names_one_bound(effc, tmp_path):
    (tmp_path / "r.effspec").write_text(text("params <= 2 * base"))
    for gate, said in (("bytes", "no bound begins with `bytes`"), ("params", "2 bounds begin with `params`")):
        run = effc("bisect", "r.effspec", "--gate", gate, "-q")
        assert run.code == 2 and "error[unknown-gate]" in run.err and said in run.err
