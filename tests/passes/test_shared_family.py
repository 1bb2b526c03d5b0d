"""The target `family`: weights written once, from which `effc pick` cuts points out."""

import json
import shutil

import pytest
import torch
from effc.compiler.artifacts.load import load, verify_signature_and_files
from effc.compiler.artifacts.signature import sign_artifact
from effc.compiler.artifacts.signing_keys import key_id, write_key_pair
from effc.compiler.cli.main import main
from effc.compiler.driver import api
from effc.compiler.driver.pick import copy_point, point_folder_or_copy
from effc.compiler.driver.point_limits import Limit
from effc.dsl.syntax.diagnostics import Reject

from tests.passes.test_workers import CUT, MIN_SAMPLES, NET, written

FEWER = MIN_SAMPLES.replace("evals: 8", "evals: 4")  # each point is emitted twice, reopened and measured

GROWN = "supernet.elastic(channels: [100%, 50%], depth: blocks, data: rows, steps: 2, batch: 2, ranks: [4, 2])"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each point is computed again by fresh processes


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """The same front as `family` and as `front`."""
    folder = tmp_path_factory.mktemp("family")
    recipe = written(folder, GROWN, FEWER)
    recipe.write_text(recipe.read_text().replace('front("lean")', 'front("apart")\n  family("once")'))
    api.compile(recipe, folder / "out", cache_dir=folder / "cache", threads=1)
    return folder / "out"


def test_points_that_are_cut_out_of_shared_weights_are_those_that_were_written_apart(artifacts, tmp_path):
    points = [m["name"] for m in json.loads((artifacts / "once/manifest.json").read_bytes())["members"]]
    assert len(points) > 1 and len([*(artifacts / "once").rglob("model.safetensors")]) == 1
    ids = torch.arange(3, 15)[None]
    for number, name in enumerate(points[:2]):
        one, _ = copy_point(artifacts / "once", tmp_path / f"once-{number}", point_name=name)
        other, manifest = copy_point(artifacts / "apart", tmp_path / f"apart-{number}", point_name=str(number + 1))
        assert one == other == name and manifest.kind == "hf"
        with torch.no_grad():
            found, wanted = (load(tmp_path / f"{kind}-{number}")(ids).logits for kind in ("once", "apart"))
        assert torch.equal(found, wanted)
    assert load(point_folder_or_copy(artifacts / "once", points[-1])) is not None


def test_a_point_to_talk_to_without_a_tokenizer_is_refused_before_it_is_cut_out(artifacts):
    with pytest.raises(Reject, match="no-words") as caught:
        point_folder_or_copy(artifacts / "once", "1", needs_tokenizer=True)
    assert caught.value.diagnostics[0].message == f"{artifacts / 'once'} has no tokenizer"


def test_a_point_to_run_is_cut_out_of_a_front_that_one_of_the_keys_signed(artifacts, tmp_path):
    front = shutil.copytree(artifacts / "once", tmp_path / "once")
    ours, theirs = (write_key_pair(tmp_path / f"{name}.key") for name in ("ours", "theirs"))
    sign_artifact(front, tmp_path / "ours.key")
    assert verify_signature_and_files(front, [theirs, ours]) == ours and point_folder_or_copy(front, "1").is_dir()
    with pytest.raises(Reject, match="unsigned-artifact") as caught:
        verify_signature_and_files(front, [theirs])
    assert caught.value.diagnostics[0].message.startswith(f"{front} is signed by the key {key_id(ours)}")


def test_a_point_is_picked_by_what_was_measured(artifacts, tmp_path):
    members = json.loads((artifacts / "once/manifest.json").read_bytes())["members"]
    sizes = {m["name"]: next(v for name, v, *_ in m["measures"] if name == "params") for m in members}
    least = min(sizes, key=sizes.get)
    assert (
        copy_point(artifacts / "once", tmp_path / "least", limits=(Limit("params", str(int(sizes[least]))),))[0]
        == least
    )


@pytest.mark.parametrize("form", ["text", "json"])
def test_inspect_says_how_far_off_times_from_a_table_are(artifacts, tmp_path, capsys, form):
    front = shutil.copytree(artifacts / "once", tmp_path / "once")
    body = json.loads((front / "manifest.json").read_bytes())
    body["steps"][-1]["decisions"] = [{"evaluated": 4, "latency_error": 0.07}]
    (front / "manifest.json").write_text(json.dumps(body))
    assert main(["inspect", str(front), "--format", form]) == 0
    said = capsys.readouterr()
    assert "7.0% off at most" in said.err if form == "text" else json.loads(said.out)["latency_error"] == 0.07


@pytest.mark.parametrize("field", ["values", "places", "choice", "orders"])
def test_a_family_that_does_not_fit_its_weights_is_refused(artifacts, tmp_path, field):
    from effc.compiler.core.settings import Settings
    from effc.compiler.models.checkpoints.model_folder import origin_of_folder
    from effc.compiler.transforms.supernet import shared_weights

    shutil.copytree(artifacts / "once", tmp_path / "once")
    body = json.loads((tmp_path / "once" / shared_weights.FAMILY).read_bytes())
    name, dim = next(iter(body["points"])), next(d for d in body["family"]["space"] if d["kind"] == "channels")
    if field == "choice":
        body["points"][name][dim["name"]] = 7
    elif field == "orders":
        body["family"]["orders"] = {site: items[1:] for site, items in body["family"]["orders"].items()}
    else:
        dim[field] = [10**6, 8] if field == "values" else ["model.layers.9.mlp"]
    (tmp_path / "once" / shared_weights.FAMILY).write_text(json.dumps(body))
    model = tmp_path / "once" / shared_weights.WEIGHTS
    with pytest.raises(Reject, match="cache-damaged"):
        shared_weights.load_and_cut_program_of_point(
            tmp_path / "once", name, origin_of_folder(model, "model", "auto", Settings(tmp_path))
        )


def test_a_family_whose_model_is_of_no_config_is_refused(tmp_path):
    recipe = written(tmp_path, CUT, NET, MIN_SAMPLES)
    recipe.write_text(recipe.read_text().replace('front("lean")', 'family("lean")'))
    with pytest.raises(Reject, match="no-shared-weights"):
        api.compile(recipe, tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
