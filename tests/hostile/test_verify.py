"""`effc verify` and `effc doctor --trust` say ok of no artifact that loading refuses."""

import json
import shutil

import pytest
from effc.compiler.artifacts.load import load, locate_checkpoint_and_artifact
from effc.compiler.driver.models import _tokenizer
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.cli.verbs.conftest import effc, own_cache  # noqa: F401
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
            _tokenizer(locate_checkpoint_and_artifact(case)[0])
    assert effc("verify", case).code == 5
    run = effc("doctor", "--trust", case, "--format", "json")
    states = {check["topic"]: check["state"] for check in json.loads(run.out)["checks"]}
    assert run.code == 5 and (states["files"], states["forms"]) == ("ok", "bad")
