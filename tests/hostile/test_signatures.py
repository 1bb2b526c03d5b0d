"""An artifact that must be signed is not looked into before its signature and all of its hashes are."""

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

import effc as package
import pytest
import typer
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from effc.compiler.artifacts.signature import bytes_to_sign, find_valid_signer, read_signatures, sign_artifact
from effc.compiler.artifacts.signing_keys import write_key_pair
from effc.compiler.cli.main import make_app
from effc.compiler.core.settings import Settings
from effc.compiler.driver.models import resolve_recipe_model
from effc.compiler.plugin.context import Context
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.recipe import Invocation
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.cli.verbs.conftest import effc, own_cache  # noqa: F401
from tests.hostile.kinds import honest

SIGNED_FILES = {
    "manifest.json",
    "measures.json",
    "sbom.json",
    "signatures.json",
    "model.sig",
}  # read to check a signature
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


def signed_copy(artifacts, tmp_path, kind: str = "stock", key_type: str = "ed25519") -> tuple[Path, str]:
    folder = Path(shutil.copytree(artifacts / kind, tmp_path / kind))
    key = write_key_pair(tmp_path / "key", key_type)
    sign_artifact(folder, tmp_path / "key")
    return folder, key


@pytest.mark.parametrize(
    ("condition", "objection"),
    [
        ("", ""), ("until=2999-01-01", ""), ("since=2020-01-01", ""), ("since=2020-01-01 until=2999-01-01", ""),
        ("until=2020-01-01", "good until 2020-01-01 only"), ("since=2999-01-01", "signatures since 2999-01-01"),
        ("revoked", "was revoked"), ("since=2020-01-01 revoked", "was revoked"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key_type", ["p256", "ed25519"])
def test_a_file_of_keys_says_until_when_since_when_and_whether_a_key_counts(
    effc,  # noqa: F811
    artifacts,
    tmp_path,
    condition,
    objection,
    key_type,
):
    folder, key = signed_copy(artifacts, tmp_path, key_type=key_type)
    other = write_key_pair(tmp_path / "other")
    (tmp_path / "keys").write_text(f"# ours\n{other}  # of the other team\n\n{key} {condition}\n")
    run = effc("verify", folder, "--require-signature", tmp_path / "keys")
    assert run.code == (5 if objection else 0) and objection in run.err


def test_a_key_that_any_line_revokes_is_revoked_wherever_it_stands(effc, artifacts, tmp_path):  # noqa: F811
    folder, key = signed_copy(artifacts, tmp_path)
    (tmp_path / "revoked").write_text(f"{key} revoked\n")
    for order in ((key, tmp_path / "revoked"), (tmp_path / "revoked", key)):
        run = effc("verify", folder, *(word for one in order for word in ("--require-signature", one)))
        assert run.code == 5 and "was revoked" in run.err


@pytest.mark.parametrize("condition", ["since=2999-01-01", "until=2020-01-01"])
def test_a_condition_on_a_key_counts_wherever_else_the_key_stands(artifacts, tmp_path, condition):
    folder, key = signed_copy(artifacts, tmp_path)
    (tmp_path / "keys").write_text(f"{key} {condition}\n")
    for order in ([key, str(tmp_path / "keys")], [str(tmp_path / "keys"), key]):
        with pytest.raises(Reject, match="is signed, but"):
            find_valid_signer(folder, order)


@pytest.mark.parametrize(
    "line",
    [
        "{} until=soon",
        "{} before=2020-01-01",
        "{} until",
        "{} until=2020-01-01 until=2999-01-01",
        "ssh-ed25519 AAAA",
        "# none",
    ],
)
def test_a_line_that_means_nothing_is_refused(effc, artifacts, tmp_path, line):  # noqa: F811
    folder, key = signed_copy(artifacts, tmp_path)
    (tmp_path / "keys").write_text(line.format(key) + "\n")
    run = effc("verify", folder, "--require-signature", tmp_path / "keys")
    assert run.code == 2 and "bad-signing-key" in run.err


def test_the_time_of_a_signature_is_signed_and_signatures_without_one_count_as_before(artifacts, tmp_path):
    folder, key = signed_copy(artifacts, tmp_path)
    path = folder / "signatures.json"
    body = json.loads(path.read_text())
    body["signatures"][0]["signed"] = "2999-01-01T00:00:00+00:00"
    path.write_text(json.dumps(body))
    with pytest.raises(Reject, match="has changed since"):
        find_valid_signer(folder, [key])
    secret = load_pem_private_key((tmp_path / "key").read_bytes(), password=None)
    old = {"key": key, "signature": base64.b64encode(secret.sign(bytes_to_sign(folder, "old"))).decode(), "note": "old"}
    path.write_text(json.dumps({"format": 1, "signatures": [old]}))
    assert find_valid_signer(folder, [key]) == key
    (tmp_path / "keys").write_text(f"{key} since=2020-01-01\n")
    with pytest.raises(Reject, match="at no stated time"):
        find_valid_signer(folder, [str(tmp_path / "keys")])


RECIPE = """effspec 1
model base = hf("./{model}")
pipeline same(base) {{ }}
emit same {{ hf("same") }}
"""


@pytest.mark.parametrize("place", ["stock/model", "stock/.model"])
@pytest.mark.slow
def test_a_model_that_a_recipe_takes_from_an_artifact_is_signed_where_signatures_are_required(
    effc,  # noqa: F811
    artifacts,
    tmp_path,
    place,
):
    shutil.copytree(artifacts / "stock", tmp_path / "stock")
    (tmp_path / "r.effspec").write_text(RECIPE.format(model=place))
    key = write_key_pair(tmp_path / "key")
    opened.clear()
    run = effc("compile", "r.effspec", "--require-signature", key)
    assert run.code == 5 and "unsigned-artifact" in run.err and "r.effspec:2:" in run.err
    assert files_read(tmp_path / "stock") <= SIGNED_FILES
    sign_artifact(tmp_path / "stock", tmp_path / "key")
    if place.endswith("/.model"):
        shutil.copytree(tmp_path / "stock" / "model", tmp_path / place)
        assert effc("compile", "r.effspec", "--require-signature", key).code == 5
    else:
        assert effc("compile", "r.effspec", "--require-signature", key).code == 0


@pytest.mark.parametrize("model", ["stock/model", "current"])
def test_a_model_folder_without_its_manifest_is_refused_where_signatures_are_required(artifacts, tmp_path, model):
    key = write_key_pair(tmp_path / "key")
    shutil.copytree(artifacts / "stock", tmp_path / "stock")
    (tmp_path / "current").symlink_to(tmp_path / "stock" / "model")

    def resolve(**settings: bool):
        options = Settings(tmp_path / "cache", signed_by=(key,), offline=True, **settings)
        ctx = Context.without_recipe(options, tmp_path, Registry())
        return resolve_recipe_model(Invocation("hf", {"name": f"./{model}", "revision": "main", "dtype": "auto"}), ctx)

    with pytest.raises(Reject, match="is not signed"):
        resolve()
    for file in ("manifest.json", "signatures.json"):
        (tmp_path / "stock" / file).unlink(missing_ok=True)
    with pytest.raises(Reject, match="lies in no artifact"):
        resolve()
    assert resolve(locked=True).folder == tmp_path / model


def test_a_signature_holds_a_provenance_in_the_words_of_in_toto(effc, artifacts, tmp_path, monkeypatch):  # noqa: F811
    for name in ("GITHUB_SHA", "GITHUB_RUN_ID", "CI_COMMIT_SHA", "CI_JOB_URL"):
        monkeypatch.delenv(name, raising=False)
    folder, _ = signed_copy(artifacts, tmp_path, "native")
    job = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "a/b", "GITHUB_SHA": "0" * 40}
    for commit, variables in ((None, {}), ("0" * 40, {**job, "GITHUB_RUN_ID": "7"})):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        sign_artifact(folder, tmp_path / "key")
        (signature,) = read_signatures(folder)
        said = signature.provenance
        digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
        assert said["subject"] == [{"name": "manifest.json", "digest": {"sha256": digest}}]
        assert said["_type"] == "https://in-toto.io/Statement/v1"
        built = said["predicate"]["buildDefinition"]
        manifest = json.loads((folder / "manifest.json").read_text())
        text = manifest["recipe"]["text"]
        assert built["externalParameters"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        names = {dependency["name"] for dependency in built["resolvedDependencies"]}
        assert names >= {*manifest["lock"]["inputs"], *manifest["lock"]["versions"]}
        signer = said["predicate"]["effc_signer"]
        assert signer.get("commit", {}).get("digest") == ({"gitCommit": commit} if commit else None)
        assert not any("digest" in d for d in built["resolvedDependencies"]), "nobody knows who compiled it"
        assert "github" not in json.dumps(said["predicate"]["runDetails"])
        run = effc("doctor", "--trust", folder, "--format", "json")
        (fact,) = [c["fact"] for c in json.loads(run.out)["checks"] if c["topic"] == "provenance"]
        assert manifest["recipe"]["name"] in fact and ("actions/runs/7" in fact) == bool(commit)


@pytest.mark.parametrize("long", ["recipe", "job", "signed"])
def test_what_a_stranger_signs_fills_no_screen(effc, artifacts, tmp_path, long):  # noqa: F811
    folder, key = signed_copy(artifacts, tmp_path)
    (signature,) = read_signatures(folder)
    provenance, signed = json.loads(json.dumps(signature.provenance)), signature.signed
    if long == "recipe":
        provenance["predicate"]["buildDefinition"]["externalParameters"]["recipe"] = "x" * 100_000
    elif long == "job":
        provenance["predicate"]["effc_signer"] = {"job": "x" * 100_000}
    else:
        signed = "9" * 100_000
    secret = load_pem_private_key((tmp_path / "key").read_bytes(), password=None)
    value = base64.b64encode(secret.sign(bytes_to_sign(folder, "", signed, provenance))).decode()
    entry = {"key": key, "signature": value, "note": "", "signed": signed, "provenance": provenance}
    (folder / "signatures.json").write_text(json.dumps({"format": 2, "signatures": [entry]}))
    for form in ("text", "json"):
        run = effc("doctor", "--trust", folder, "--format", form)
        assert len(run.out + run.err) < 10_000 and run.code == (5 if long == "signed" else 0)


def test_an_artifact_takes_no_more_signatures_than_can_be_read(artifacts, tmp_path):
    folder, _ = signed_copy(artifacts, tmp_path)
    path = folder / "signatures.json"
    cases = [(32, "", "as many signatures as can be read"), (1, "x" * 20_000, "at most 16384 are kept")]
    for count, note, message in cases:
        keys = [f"ed25519:{base64.b64encode(bytes([i]) * 32).decode()}" for i in range(count)]
        entries = [{"key": key, "signature": "", "note": note} for key in keys]
        path.write_text(json.dumps({"format": 2, "signatures": entries}))
        before = path.read_bytes()
        with pytest.raises(Reject, match=message):
            sign_artifact(folder, tmp_path / "key", note)
        assert path.read_bytes() == before


@pytest.mark.parametrize("provenance", [{"predicate": 3}, {}, {"_type": "\ud800"}, 3, {"n": float("nan")}])
def test_a_provenance_that_was_edited_is_not_signed(effc, artifacts, tmp_path, provenance):  # noqa: F811
    folder, key = signed_copy(artifacts, tmp_path)
    body = json.loads((folder / "signatures.json").read_text())
    body["signatures"][0]["provenance"] = provenance
    (folder / "signatures.json").write_text(json.dumps(body))
    run = effc("verify", folder, "--require-signature", key)
    assert run.code == 5 and "unsigned-artifact" in run.err
    assert effc("doctor", "--trust", folder).code == 5


def test_a_provenance_beside_a_signature_of_the_older_format_is_not_taken_as_signed(effc, artifacts, tmp_path):  # noqa: F811
    """Format 1 signs no provenance: whoever passes the artifact on could add one."""
    folder, key = signed_copy(artifacts, tmp_path)
    secret = load_pem_private_key((tmp_path / "key").read_bytes(), password=None)
    forged = json.loads((folder / "signatures.json").read_text())["signatures"][0]["provenance"]
    old = {"key": key, "signature": base64.b64encode(secret.sign(bytes_to_sign(folder, "old"))).decode(), "note": "old"}
    (folder / "signatures.json").write_text(json.dumps({"format": 1, "signatures": [{**old, "provenance": forged}]}))
    run = effc("doctor", "--trust", folder)
    assert run.code == 5 and "format 1 signs no provenance" in run.out and "built by" not in run.out


@pytest.mark.parametrize("words", ["a\nok    signature  by you", "\x1b[2J"])
def test_no_time_and_no_provenance_passes_for_a_line_of_ours(effc, artifacts, tmp_path, words, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CI_JOB_URL", words)
    folder, _ = signed_copy(artifacts, tmp_path)  # by whoever sends it: the signature holds
    run = effc("doctor", "--trust", folder)
    assert run.code == 5 and "control characters" in run.out and "\x1b" not in run.out
    assert not any(line.startswith("ok    signature") for line in run.out.splitlines())
