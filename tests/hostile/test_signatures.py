"""An artifact that must be signed is not looked into before its signature and all of its hashes are."""

import shutil
import sys
from pathlib import Path

import effc as package
import pytest
import typer
from effc.compiler.artifacts.signature import sign_artifact, write_key_pair
from effc.compiler.cli.main import make_app
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.cli.verbs.conftest import effc, own_cache  # noqa: F401
from tests.hostile.kinds import honest

SIGNED_FILES = {"manifest.json", "measures.json", "sbom.json", "signatures.json"}  # read to check a signature
VERBS = {
    "run": ("native", "run {} --prompt a"),
    "run a base of samples": ("rttc", "run {} --prompt a"),
    "run a federation": ("flower", "run {}"),
    "run a point": ("front", "run {} --pick 1 --prompt a"),
    "serve": ("stock", "serve {} --port 0"),
    "serve samples": ("rttc", "serve {} --role server --port 0"),
    "inspect": ("stock", "inspect {}"),
    "inspect a front": ("front", "inspect {}"),
    "test": ("compact", "test {}"),
    "diff": ("stock", "diff {} {}"),
    "pick": ("front", "pick {} --point 1"),
    "report": ("native", "report {}"),
    "verify": ("onnx", "verify {}"),
    "federate": ("flower", "federate up {}"),
}
opened: list[str] = []


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signatures")
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    return honest(folder)


def command(words: str, artifact: Path, key: str) -> list[str]:
    flag = "--verify-key" if words.startswith("verify") else "--require-signature"
    return [*words.format(artifact, artifact).split(), flag, key]


def files_read(folder: Path) -> set[str]:
    return {Path(name).relative_to(folder).as_posix() for name in opened if name.startswith(f"{folder}/")}


@pytest.mark.parametrize("verb", VERBS)
def test_an_artifact_without_the_required_signature_is_not_read(effc, artifacts, tmp_path, verb):  # noqa: F811
    kind, words = VERBS[verb]
    shutil.copytree(artifacts / kind, tmp_path / kind)
    ours, _ = write_key_pair(tmp_path / "ours"), write_key_pair(tmp_path / "theirs")
    sign_artifact(tmp_path / kind, tmp_path / "theirs")
    opened.clear()
    run = effc(*command(words, tmp_path / kind, ours))
    assert run.code == 5 and "unsigned-artifact" in run.err
    assert files_read(tmp_path / kind) <= SIGNED_FILES


@pytest.mark.parametrize("verb", VERBS)
def test_no_file_of_a_signed_artifact_is_parsed_before_all_have_the_signed_content(effc, artifacts, tmp_path, verb):  # noqa: F811
    kind, words = VERBS[verb]
    shutil.copytree(artifacts / kind, tmp_path / kind)
    key = write_key_pair(tmp_path / "key")
    sign_artifact(tmp_path / kind, tmp_path / "key")
    changed = sorted(f for f in (tmp_path / kind).rglob("*.json") if f.name not in SIGNED_FILES)
    assert changed
    for file in changed:
        file.write_bytes(b"{" * file.stat().st_size)
    run = effc(*command(words, tmp_path / kind, key))
    assert run.code == 5
    assert set(filter(lambda line: line.startswith("error["), run.err.splitlines())) >= {
        f"error[artifact-edited]: {file} has other content than when it was written" for file in changed
    }


def test_an_adapter_is_signed_too_before_the_model_is_opened(effc, artifacts, tmp_path):  # noqa: F811
    shutil.copytree(artifacts / "stock", tmp_path / "stock")
    key = write_key_pair(tmp_path / "key")
    sign_artifact(tmp_path / "stock", tmp_path / "key")
    opened.clear()
    words = f"run {tmp_path / 'stock'} --adapter one={artifacts / 'reft'} --prompt a"
    run = effc(*words.split(), "--require-signature", key)
    assert run.code == 5 and f"{artifacts / 'reft'} is not signed" in run.err
    assert files_read(artifacts / "reft") <= SIGNED_FILES


def test_what_is_no_artifact_is_not_opened_where_a_signature_is_required(effc, artifacts, tmp_path):  # noqa: F811
    key = write_key_pair(tmp_path / "key")
    for place in ("zoo:tiny-llama", str(artifacts.parent / "source"), str(tmp_path / "nowhere")):
        run = effc("run", place, "--prompt", "a", "--require-signature", key)
        assert run.code == 5 and "artifacts alone are signed" in run.err


def test_a_hidden_folder_inside_a_signed_artifact_is_not_signed(artifacts, tmp_path):
    shutil.copytree(artifacts / "stock", tmp_path / "stock")
    key = write_key_pair(tmp_path / "key")
    sign_artifact(tmp_path / "stock", tmp_path / "key")
    shutil.copytree(tmp_path / "stock" / "model", tmp_path / "stock" / ".hidden")
    assert package.load(tmp_path / "stock" / "model", signed_by=[key]) is not None
    with pytest.raises(Reject, match="unsigned-artifact"):
        package.load(tmp_path / "stock" / ".hidden", signed_by=[key])


def test_every_verb_that_opens_an_artifact_can_require_a_signature():
    reports = {"sign", "verify", "new", "federate status", "federate down"}  # these report on it, or do not open it
    commands = typer.main.get_command(make_app()).commands
    groups = {f"{name} {n}": c for name, g in commands.items() for n, c in getattr(g, "commands", {}).items()}
    verbs = {name: c for name, c in {**commands, **groups}.items() if not hasattr(c, "commands")}
    words = ("artifact", "`front`", "`flower`", "model folder")
    takes = {
        name
        for name, command in verbs.items()
        if any(
            p.param_type_name == "argument" and any(w in (p.help or "").lower() for w in words) for p in command.params
        )
    }
    requires = {name for name, c in verbs.items() if any("--require-signature" in p.opts for p in c.params)}
    assert {"run", "serve", "inspect", "test", "diff", "pick", "report", "federate up"} <= requires
    assert takes - reports <= requires
