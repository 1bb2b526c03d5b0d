"""Results that are not one model: fronts and adapters, from the recipe to what reloads; and bounds, each judged once."""

import json
import subprocess
import sys
from dataclasses import replace

import effc
import pytest
import torch
from effc.compiler.artifacts.artifact import artifact_hash
from effc.compiler.artifacts.front_kinds import members_with_interleaved_times
from effc.compiler.artifacts.manifest import read_manifest
from effc.compiler.driver import api
from effc.compiler.driver.pick import copy_point, refuse_profile_mismatch
from effc.compiler.driver.point_limits import Limit
from effc.dsl.syntax.diagnostics import Reject
from effc.kernels.levels import NAMES

from tests import tiny

HEAD = """effspec 1
model base = config("tiny.json", seed: 3)
data  rows = synthetic(4, length: 12, seed: 1)
data  more = synthetic(6, length: 12, seed: 2)
"""
FRONT = (
    HEAD
    + """
pipeline sizes(base) {
  thin  = prune.channels(keep: 75% of channels, align: 16)
  slim  = prune.channels(keep: 50% of channels, align: 16, from: base)
  front = search.front(points: [thin, slim], measure: [perplexity(rows), params, decode.p50(prompt: 4, steps: 2)])
}
expect sizes {
  params <= 0.99 * base
  params <= 0.9 * base in any
  params <= 0.1 * base in slim
}
emit sizes { front("sizes") }
"""
)
SPEED = "decode.p50(prompt: 4, steps: 2)"
ADAPTERS = (
    HEAD
    + """
pipeline tuned(base) {
  apart = tune.heal(data: rows, steps: 3, batch: 2, lr: 1e-2, merge: false)
}
emit tuned { peft("adapter") }
"""
)


def write(folder, text):
    config = tiny.config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}
    (folder / "tiny.json").write_text(json.dumps(config))
    (folder / "r.effspec").write_text(text)
    return folder / "r.effspec"


def compiled(folder, text, **options):
    options = {"cache_dir": folder / "cache", "threads": 1, **options}
    (result,) = api.compile(write(folder, text), folder / "out", force=True, **options)
    return result


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("front"), FRONT)


@pytest.mark.slow
def test_a_front_holds_every_point_with_its_measures(front):
    members = read_manifest(front.artifacts[0].path).members
    assert [m["name"] for m in members] == ["thin", "slim"]
    assert [metric for metric, *_ in members[0]["measures"]] == ["perplexity(rows)", "params", SPEED]
    params = [m["measures"][1][1] for m in members]
    assert params[0] > params[1]
    assert members[1]["steps"] == ["slim"], "a branch does not come with the steps of another"


def test_each_point_is_asked_unless_the_bound_says_which(front):
    verdicts = {e.text: e.outcome for e in front.artifacts[0].manifest.expectations}
    assert verdicts == {
        "params <= 0.99 * base": "holds",
        "params <= 0.9 * base in any": "holds",
        "params <= 0.1 * base in slim": "fails",
    }
    (missed,) = front.missed
    assert "of `slim`" in missed.message


def test_the_table_of_a_front_says_what_it_is_measured_by(front):
    rows = [m.metric for m in front.artifacts[0].manifest.measures]
    assert {"perplexity(rows) of thin", "perplexity(rows) of slim", "bytes of slim"} <= set(rows)
    values = {m["name"]: m["measures"][0][1] for m in read_manifest(front.artifacts[0].path).members}
    for row in front.artifacts[0].manifest.measures:
        if row.metric.startswith("perplexity"):
            assert row.compiled == pytest.approx(values[row.metric.rpartition(" ")[2]], rel=1e-5)


def test_who_names_a_point_as_an_artifact_is_told_how_it_becomes_one(front):
    path = front.artifacts[0].path
    for folder, words in (
        ("points/slim", f"effc pick {path} --point slim"),
        ("points", f"lies in the artifact {path}"),
    ):
        with pytest.raises(Reject) as caught:
            read_manifest(path / folder)
        assert words in caught.value.diagnostics[0].help


def test_times_of_points_are_told_over_one_time_of_the_original(front):
    manifest = read_manifest(front.artifacts[0].path)
    rows = [m for m in manifest.measures if m.metric.startswith(SPEED)]
    assert [m.metric for m in rows] == [f"{SPEED} of thin", f"{SPEED} of slim"]
    assert len({m.original for m in rows}) == 1
    assert all(m.compiled == pytest.approx(m.original * m.ratio) for m in rows)
    assert [m["measures"][2][1] for m in members_with_interleaved_times(manifest)] == [m.compiled for m in rows]


def test_every_point_was_reopened_in_a_process_of_its_own(front):
    seen = {check.what.partition(",")[0] for check in front.artifacts[0].manifest.checks}
    assert {name.split("/")[1] for name in seen} == {"thin", "slim"}


@pytest.mark.slow
def test_what_is_picked_is_the_point_itself_and_an_artifact_of_its_own(front, tmp_path):
    path = front.artifacts[0].path
    events = []
    name, manifest = copy_point(path, tmp_path / "small", limits=(Limit("params", "1B"),), on_event=events.append)
    assert {e.stage for e in events if type(e).__name__ in ("StageBegan", "StageEnded")} == {"pick"}
    best = min(read_manifest(path).members, key=lambda m: m["measures"][0][1])["name"]
    assert name == best and manifest.kind == "hf" and manifest.checks
    ids = torch.arange(5)[None]
    held = next(f for f in (path / "points" / name).iterdir() if f.is_dir())
    with torch.no_grad():
        assert torch.equal(effc.load(tmp_path / "small")(ids).logits, effc.load(held)(ids).logits)


@pytest.mark.parametrize(
    "asked, slug",
    [
        ({"point_name": "3"}, "no-such-point"),
        ({"point_name": "fat"}, "no-such-point"),
        ({"limits": (Limit("params", "12"),)}, "none-fits"),
        ({"limits": (Limit("bytes", "1KiB"),)}, "none-fits"),
        ({"limits": (Limit("throughput", "1"),)}, "unmeasured-limit"),
        ({"limits": (Limit("params", "many"),)}, "no-amount"),
    ],
)
def test_a_pick_that_fits_no_point_is_refused_and_leaves_nothing(front, tmp_path, asked, slug):
    with pytest.raises(Reject) as caught:
        copy_point(front.artifacts[0].path, tmp_path / "small", **asked)
    assert [d.fault.slug for d in caught.value.diagnostics] == [slug]
    assert not list(tmp_path.iterdir())


def test_a_point_is_picked_for_the_machine_that_its_measures_are_of(front):
    manifest = read_manifest(front.artifacts[0].path)
    assert manifest.machine["isa"] in NAMES and manifest.machine["threads"] == 1
    profiles = {
        "any": {"isa": "portable"},
        "wide": {"isa": "portable", "threads": 64},
        "best": {"isa": NAMES[-1]},
        "other": {"isa": "sve2"},
    }
    told = replace(manifest, recipe={"resolved": {"profiles": profiles}}, machine={**manifest.machine, "isa": "avx2"})
    refuse_profile_mismatch(told, "any")
    for name, words in (("wide", "64 threads, and 1 were"), ("best", "has avx2"), ("other", "nothing says whether")):
        with pytest.raises(Reject, match="measured-elsewhere") as caught:
            refuse_profile_mismatch(told, name)
        assert words in caught.value.diagnostics[0].message
    with pytest.raises(Reject, match="no-such-point") as caught:
        refuse_profile_mismatch(told, "zen4")
    assert "any, wide, best, other" in caught.value.diagnostics[0].help


def test_an_edited_point_is_not_picked(front, tmp_path):
    import shutil

    shutil.copytree(front.artifacts[0].path, tmp_path / "front")
    weights = next((tmp_path / "front/points/slim").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Reject) as caught:
        copy_point(tmp_path / "front", tmp_path / "small", point_name="slim")
    assert caught.value.diagnostics[0].fault.slug == "artifact-edited"


def test_a_point_loads_by_its_path_and_only_as_its_manifest_has_it(front, tmp_path):
    import shutil

    path = front.artifacts[0].path
    folder = path / "points/slim"
    assert isinstance(effc.load(folder), torch.nn.Module)
    with pytest.raises(Reject, match="no point fat"):
        effc.load(path / "points/fat")
    shutil.copytree(path, tmp_path / "front")
    weights = next((tmp_path / "front/points/slim").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Reject) as caught:
        effc.load(tmp_path / "front/points/slim")
    assert caught.value.diagnostics[0].fault.slug == "artifact-edited"


def test_a_front_is_tested_again_point_by_point(front):
    from effc.compiler.driver.judging.retest import remeasure_artifact as again

    path = front.artifacts[0].path
    session = api.open_session(path.parents[1] / "r.effspec", cache_dir=path.parents[1] / "cache", threads=1)
    (tested,) = again(path, session, api.plan_all_pipelines(session))
    assert [o.state for o in tested.outcomes] == ["ok", "ok", "missed"]


@pytest.mark.slow
def test_a_second_compile_of_a_front_runs_no_step_and_gives_the_same_hash(front, tmp_path):
    folder = front.artifacts[0].path.parents[1]
    before = artifact_hash(front.artifacts[0].path)
    events = []
    again = compiled(folder, FRONT, on_event=events.append)
    cached = [e.cached for e in events if type(e).__name__ == "StageEnded"]
    assert cached == [True, True, True, False] and artifact_hash(again.artifacts[0].path) == before


@pytest.mark.slow
def test_stock_peft_opens_the_adapters_and_computes_what_effc_does(tmp_path):
    pytest.importorskip("peft")
    path = compiled(tmp_path, ADAPTERS).artifacts[0].path
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(path / 'base')!r})\n"
        "ids = torch.arange(5)[None]; plain = base(ids).logits\n"
        f"model = PeftModel.from_pretrained(base, {str(path / 'adapter')!r}).eval()\n"
        "logits = model(ids).logits\n"
        "assert not any(n.split('.')[0] == 'effc' for n in sys.modules)\n"
        "assert (logits - plain).abs().max() > 1e-4, 'the adapters change nothing'\n"
        "print(logits.flatten().tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        ours = effc.load(path)(torch.arange(5)[None]).logits
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), ours.flatten(), atol=1e-5)


@pytest.mark.slow
def test_adapters_on_shapes_that_no_config_has_are_refused_with_a_way_out(tmp_path):
    text = ADAPTERS.replace(
        "  apart", "  thin = prune.channels(keep: 75% of channels, align: 16, score: perplexity(more))\n  apart"
    )
    with pytest.raises(Reject) as caught:
        compiled(tmp_path, text)
    assert caught.value.diagnostics[0].fault.slug == "shaped-base"
    assert not any((tmp_path / "out").glob("adapter"))


@pytest.mark.slow
def test_bounds_are_judged_where_no_target_writes_a_model(tmp_path):
    text = (
        HEAD
        + """
pipeline lean(base) { slim = prune.blocks(remove: 1, score: perplexity(rows)) }
expect lean { params <= 0.1 * base }
emit lean { pruning_config("config") }
"""
    )
    result = compiled(tmp_path, text)
    assert [d.fault.slug for d in result.missed] == ["expectation-missed"]
    assert [e.outcome for e in result.artifacts[0].manifest.expectations] == ["fails"]


@pytest.mark.slow
def test_a_bound_is_judged_once_however_many_targets_there_are(tmp_path):
    text = (
        HEAD
        + """
pipeline lean(base) { slim = prune.blocks(remove: 1, score: perplexity(rows)) }
expect lean { params <= 0.1 * base }
emit lean { pruning_config("config")  hf("a", form: compact)  hf("b", form: compact) }
"""
    )
    result = compiled(tmp_path, text)
    assert len(result.missed) == 1
    assert [len(a.manifest.expectations) for a in result.artifacts] == [1, 1, 1], "each artifact tells of it"


@pytest.mark.slow
def test_a_bound_in_a_target_is_asked_of_that_artifact_alone(tmp_path):
    text = (
        HEAD
        + """
pipeline lean(base) { slim = prune.blocks(remove: 1, score: perplexity(rows)) }
expect lean { bytes <= 0.8 * base in native }
emit lean { hf("a", form: compact)  native("cpu") }
"""
    )
    hf, native = compiled(tmp_path, text).artifacts
    assert hf.manifest.expectations == () and [e.outcome for e in native.manifest.expectations] == ["holds"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../away"},
        {"name": 5},
        {"name": "a\x1b[31m"},
        {"measures": None},
        {"measures": []},
        {"measures": [[]]},
        {"measures": [["params", "many", "", "lower"]]},
        {"measures": [["\x1b[31m", 1, "", "lower"]]},
        {"steps": 3},
    ],
)
def test_points_of_another_form_are_refused_before_they_are_used(front, tmp_path, change):
    import shutil

    shutil.copytree(front.artifacts[0].path, tmp_path / "front")
    body = json.loads((tmp_path / "front/manifest.json").read_text())
    body["members"][0] |= change
    (tmp_path / "front/manifest.json").write_text(json.dumps(body))
    with pytest.raises(Reject) as caught:
        read_manifest(tmp_path / "front")
    assert caught.value.diagnostics[0].fault.slug == "artifact-broken"


def test_linked_folders_and_pipes_in_an_artifact_are_refused(front, tmp_path):
    import os
    import shutil

    from effc.compiler.artifacts.manifest import verify_files

    for number, plant in enumerate(
        (lambda f: (f / "points/link").symlink_to("/"), lambda f: os.mkfifo(f / "points/pipe"))
    ):
        folder = tmp_path / str(number)
        shutil.copytree(front.artifacts[0].path, folder)
        plant(folder)
        with pytest.raises(Reject) as caught:
            verify_files(folder)
        assert caught.value.diagnostics[0].fault.slug == "odd-file"


def test_a_front_is_not_replaced_by_its_own_point(front):
    path = front.artifacts[0].path
    for into in (path, path / "points/new", path.parent):
        with pytest.raises(Reject) as caught:
            copy_point(path, into, point_name="slim", force=True)
        assert caught.value.diagnostics[0].fault.slug == "into-itself"


@pytest.mark.slow
def test_a_test_of_a_recipe_leaves_out_what_no_bound_speaks_of(tmp_path):
    from effc.compiler.driver.judging.retest import remeasure_recipe as again

    text = (
        HEAD
        + """
pipeline lean(base) { slim = prune.blocks(remove: 1, score: perplexity(rows)) }
expect lean { params <= 0.99 * base in pt2 }
emit lean { hf("a", form: compact)  pt2("b") }
"""
    )
    compiled(tmp_path, text)
    session = api.open_session(tmp_path / "r.effspec", cache_dir=tmp_path / "cache", threads=1)
    tested = again(session, api.plan_all_pipelines(session), tmp_path / "out")
    assert [(t.path.name, [o.state for o in t.outcomes]) for t in tested] == [("b", ["ok"])]
