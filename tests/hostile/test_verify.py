"""`effc verify` and `effc doctor --trust` say ok of no artifact that loading refuses."""

import json
import shutil

import pytest
from effc.compiler.artifacts.load import load, locate_checkpoint_and_artifact
from effc.compiler.driver.models import _load_tokenizer_or_none
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import load_file, save_file

from tests.compiler.cli.verbs.conftest import effc, own_cache  # noqa: F401
from tests.compiler.ir.test_lowered import hf, made, written
from tests.hostile.kinds import honest
from tests.hostile.mutations import consistent


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return honest(tmp_path_factory.mktemp("verify"))


def edit(file, change) -> None:
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body))


CASES = {
    "generation": ("stock", "model/generation_config.json", lambda b: b.update(eos_token_id="/dev/zero")),
    "generation of a base": ("peft", "base/generation_config.json", lambda b: b.update(bos_token_id=1e308)),
    "generation of native": ("native", "native/generation_config.json", lambda b: b.update(num_beams=10**6)),
    "tokenizer": ("stock", "model/tokenizer.json", lambda b: b.update(model=7)),
    "tokenizer of rttc": ("rttc", "model/tokenizer.json", lambda b: b.update(pre_tokenizer="x")),
    "shapes": ("stock", "model/config.json", lambda b: b.update(vocab_size=7)),
    "graph of a base": (
        "reft",
        "base/compact/config.json",
        lambda b: b["effc"]["edits"]["graphs"].update(a={"graph": 3}),
    ),
    "edits": ("compact", "compact/config.json", lambda b: b["effc"]["edits"]["attributes"].update({"no.such": 3})),
}
RUN = {
    "app": ("rttc", "app.json", lambda b: b.update(engine="none")),
    "knowledge": ("rttc", "knowledge/kb.json", lambda b: b.update(files={})),
    "federation": ("flower", "fedapp/federation.json", lambda b: b.update(strategy="none")),
}


@pytest.mark.parametrize("name", CASES | RUN)
def test_what_loading_refuses_verify_and_doctor_refuse(effc, artifacts, tmp_path, name):  # noqa: F811
    kind, file, change = (CASES | RUN)[name]
    case = shutil.copytree(artifacts / kind, tmp_path / kind)
    assert effc("verify", case).code == 0 and effc("doctor", "--trust", case).code == 0
    edit(case / file, change)
    consistent(case)
    if name in CASES:
        with pytest.raises(Reject):
            load(case)
            _load_tokenizer_or_none(locate_checkpoint_and_artifact(case)[0])
    assert effc("verify", case).code == 5
    run = effc("doctor", "--trust", case, "--format", "json")
    states = {check["topic"]: check["state"] for check in json.loads(run.out)["checks"]}
    assert run.code == 5 and (states["files"], states["forms"]) == ("ok", "bad")


def rename(file, change) -> None:
    """Write a safetensors file with another name for its first matrix."""
    tensors = load_file(file)
    name = next(n for n, x in tensors.items() if x.dim() == 2)
    tensors[change(name)] = tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("kind", ["stock", "compact", "peft"])
@pytest.mark.parametrize("change", [lambda n: f"x.{n}", lambda n: n.replace("weight", "wieght")], ids=["x", "typo"])
def test_a_tensor_of_another_name_is_none_of_the_models(effc, artifacts, tmp_path, kind, change):  # noqa: F811
    case = shutil.copytree(artifacts / kind, tmp_path / kind)
    rename(next(file for file in sorted(case.rglob("model.safetensors"))), change)
    consistent(case)
    with pytest.raises(Reject):
        load(case)
    assert effc("verify", case).code == 5


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A compact artifact whose linear modules are packed for a kernel."""
    folder = tmp_path_factory.mktemp("packed")
    return written(made(), folder, hf(form="compact"))


@pytest.mark.parametrize("place", ["weights", "magic"])
def test_packed_weights_of_a_compact_folder_are_held_against_their_checksums(effc, packed, tmp_path, place):  # noqa: F811
    case = shutil.copytree(packed, tmp_path / "case")
    assert effc("verify", case).code == 0
    file = case / "compact" / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(".packed"))
    tensors[name][{"weights": len(tensors[name]) // 2, "magic": 0}[place]] ^= 1
    save_file(tensors, file, {"format": "pt"})
    consistent(case)
    with pytest.raises(Reject, match="packed-damaged"):
        load(case)
    run = effc("verify", case)
    assert run.code == 5 and "packed-damaged" in run.err


@pytest.mark.parametrize("kind", ["reft", "peft", "stock"])
def test_weights_that_are_cut_with_hashes_that_fit_are_damaged(effc, artifacts, tmp_path, kind):  # noqa: F811
    case = shutil.copytree(artifacts / kind, tmp_path / kind)
    for file in case.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-16])
    consistent(case)
    run = effc("verify", case)
    assert run.code == 5 and "damaged-weights" in run.err, run.err
