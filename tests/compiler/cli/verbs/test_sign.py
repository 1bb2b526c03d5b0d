"""Signatures of artifacts in `signatures.json`: what was signed loads, what changed since or nobody known signed does
not."""

import base64
import json
import shutil
import stat
import subprocess
import sys
import tarfile
from importlib import metadata

import effc as package
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.artifacts.sbom import cyclonedx_json
from effc.compiler.artifacts.signature import bytes_to_sign, sign_artifact
from effc.compiler.artifacts.signing_keys import write_key_pair
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.serving.conftest import artifact, chatty  # noqa: F401
from tests.compiler.cli.verbs.conftest import effc, own_cache, process  # noqa: F401
from tests.hostile.kinds import STORED
from tests.hostile.mutations import consistent

PYTHON = ("Error", "Invalid", "unexpected keyword", "indices", "Expecting value", "codec", "argument")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A secret key's file, and the two public keys, the second a stranger's."""
    folder = tmp_path_factory.mktemp("keys")
    pairs = [write_key_pair(folder / name, "ed25519") for name in ("mine", "other")]
    return folder / "mine", *pairs


@pytest.fixture
def signed(artifact, keys, tmp_path):  # noqa: F811
    folder = tmp_path / "signed"
    shutil.copytree(artifact, folder)
    sign_artifact(folder, keys[0], "nightly")
    return folder


def test_a_signature_is_ed25519_of_the_hashes_as_another_library_user_would_check_it(signed, keys):
    (found,) = json.loads((signed / "signatures.json").read_bytes())["signatures"]
    raw = base64.b64decode(keys[1].removeprefix("ed25519:"))
    Ed25519PublicKey.from_public_bytes(raw).verify(
        base64.b64decode(found["signature"]), bytes_to_sign(signed, "nightly", found["signed"], found["provenance"])
    )
    lines = bytes_to_sign(signed).decode().splitlines()
    assert lines[0] == "effc artifact signature 1" and [line.split()[0] for line in lines[1:]] == [
        "manifest.json",
        "measures.json",
        "sbom.json",
        "note",
    ]


def test_the_secret_key_is_its_owners_alone(keys):
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600
    assert keys[0].with_name("mine.pub").read_text() == keys[1] + "\n"


def test_a_key_is_made_and_signs_and_is_checked_on_the_command_line(effc, artifact, tmp_path):  # noqa: F811
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    made = effc("sign", "--new-key", str(tmp_path / "key"), "--format", "json")
    key = json.loads(made.out)["key"]
    assert effc("sign", str(folder), "--verify-key", key).code == 5
    assert effc("sign", str(folder), "--key", str(tmp_path / "key")).code == 0
    for shown in (key, str(tmp_path / "key.pub")):
        run = effc("sign", str(folder), "--verify-key", shown)
        assert run.code == 0 and f"is signed by {key}" in run.out
    run = effc("sign", "--new-key", str(tmp_path / "key"))
    assert run.code == 2 and "file exists" in run.err


def test_signing_again_replaces_the_own_signature_and_keeps_those_of_others(signed, keys):
    other = keys[0].with_name("other")
    for _ in range(2):
        sign_artifact(signed, other)
    found = json.loads((signed / "signatures.json").read_bytes())["signatures"]
    assert [s["key"] for s in found] == [keys[1], keys[2]] and found[0]["note"] == "nightly"


@pytest.mark.parametrize("verb", ["load", "run", "serve"])
def test_what_must_be_signed_and_is_not_is_not_used(effc, artifact, signed, keys, verb):  # noqa: F811
    def used(folder, key):
        if verb == "load":
            try:
                package.load(folder, signed_by=[key])
            except Reject as error:
                return 5, error.diagnostics[0].message
            return 0, ""
        more = ["--prompt", "a", "-n", "1"] if verb == "run" else ["--port", "0"]
        run = effc(verb, str(folder), "--require-signature", key, *more)
        return run.code, run.err

    if verb != "serve":  # which would go on for ever
        assert used(signed, keys[1])[0] == 0
    code, said = used(artifact, keys[1])
    assert code == 5 and "is not signed" in said
    code, said = used(signed, keys[2])
    assert code == 5 and "which is another key" in said


def test_a_change_of_any_file_but_the_card_breaks_the_signature_or_the_files_check(signed, keys):
    (signed / "README.md").write_text("mine")
    package.load(signed, signed_by=[keys[1]])
    files = sorted(f for f in signed.rglob("*") if f.is_file() and f.name != "README.md")
    assert len(files) > 5
    for file in files:
        before = file.read_bytes()
        at = len(before) // 2
        file.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        with pytest.raises(Reject):
            package.load(signed, signed_by=[keys[1]])
        file.write_bytes(before)
    package.load(signed, signed_by=[keys[1]])


def test_one_of_several_keys_is_enough(signed, keys):
    package.load(signed, signed_by=[keys[2], keys[1]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ed25519:AAAA", "has 3 bytes"),
        ("ed25519:!", "no base64"),
        ("rsa:AAAA", "no file that holds one"),
        ("", "no file that holds one"),
        (f"p256:{'A' * 44} until=soon", "`soon` is no day such as 2030-01-31"),
        ("{mine}", "holds a secret key, and signatures are checked by the public one"),
        ("{pem}", "holds a PEM that is no public key of P-256, P-384, P-521 or Ed25519"),
    ],
)
def test_what_is_no_public_key_is_refused_as_a_mistake_of_the_command_line(effc, signed, keys, tmp_path, text, words):  # noqa: F811
    (tmp_path / "pem").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    run = effc("sign", str(signed), "--verify-key", text.format(mine=keys[0], pem=tmp_path / "pem"))
    assert run.code == 2 and words in run.err and not any(word in run.err for word in PYTHON), run.err


def test_a_public_key_signs_nothing_and_is_called_one(effc, signed, tmp_path):  # noqa: F811
    write_key_pair(tmp_path / "key")
    run = effc("sign", str(signed), "--key", str(tmp_path / "key.pub"))
    assert run.code == 2 and "key.pub is no secret key in PEM without a passphrase but a public one" in run.err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"format": 3, "signatures": []}',
        b'{"format": 1, "signatures": [{}]}',
        b"\xff",
        b'{"format": 1, "signatures": [{"key": 1, "signature": "", "note": ""}]}',
        b"[" * 60_000,
        b" " * 70_000,
        b'{"format": 1, "signatures": [{"key": "ed25519:AAAA", "signature": "AAAA", "note": ""}]}',
        b'{"format": 1, "signatures": [{"key": "a", "signature": "b", "note": "", "more": 1}]}',
        b'{"format": 1, "signatures": [3]}',
    ],
)
def test_a_file_that_holds_no_signatures_is_no_signature(signed, keys, content):
    (signed / "signatures.json").write_bytes(content)
    with pytest.raises(Reject, match="holds no signatures: ") as caught:
        package.load(signed, signed_by=[keys[1]])
    reason = caught.value.diagnostics[0].message.partition("holds no signatures: ")[2]
    assert not any(word in reason for word in PYTHON) and not reason.startswith("'"), reason


def test_an_edited_artifact_is_not_signed(artifact, keys, tmp_path):  # noqa: F811
    folder = tmp_path / "edited"
    shutil.copytree(artifact, folder)
    (folder / "native" / "plan.json").write_bytes((folder / "native" / "plan.json").read_bytes() + b" ")
    with pytest.raises(Reject, match=r"plan\.json has"):
        sign_artifact(folder, keys[0])
    assert not (folder / "signatures.json").exists()


@pytest.mark.slow
def test_the_bill_of_materials_is_the_same_whatever_the_process_had_imported():
    code = "import sys; from effc.compiler.artifacts.sbom import cyclonedx_json; from effc.compiler.artifacts.manifest import Manifest"
    code += "; sys.stdout.buffer.write(cyclonedx_json(Manifest('hf')))"
    fresh = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    here = json.loads(cyclonedx_json(Manifest("hf")))
    assert fresh["components"] == here["components"] and fresh["serialNumber"] == here["serialNumber"]
    names = {c["name"] for c in here["components"]}
    assert {"effc", "torch", "huggingface-hub"} <= names and not names & {"pytest", "hypothesis"}


def test_the_bill_of_materials_names_the_packages_that_were_used(artifact):  # noqa: F811
    body = json.loads((artifact / "sbom.json").read_bytes())
    assert (body["bomFormat"], body["specVersion"]) == ("CycloneDX", "1.6")
    assert body["serialNumber"].startswith("urn:uuid:")
    found = {c["name"]: c for c in body["components"]}
    for name in ("torch", "transformers", "safetensors", "numpy"):
        version = metadata.version(name)
        assert found[name]["version"] == version
        assert found[name]["purl"] == f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    references = [c["bom-ref"] for c in body["components"]]
    assert len(set(references)) == len(references) and body["dependencies"][0]["dependsOn"] == references


def test_doctor_tells_what_an_artifact_would_do_and_what_is_wrong_with_it(effc, signed, keys):  # noqa: F811
    def checks():
        run = effc("doctor", "--trust", str(signed), "--format", "json")
        return run.code, {c["topic"]: (c["state"], c["fact"]) for c in json.loads(run.out)["checks"]}

    code, found = checks()
    assert code == 0 and not any(state == "bad" for state, _ in found.values())
    assert keys[1] in found["signature"][1] and "engine runs a plan" in found["native"][1]
    (signed / "native" / "helper.py").write_text("print('mine')")
    (signed / "measures.json").write_bytes((signed / "measures.json").read_bytes() + b" ")
    code, found = checks()
    assert code == 5 and {t for t, (state, _) in found.items() if state == "bad"} == {"files", "signature"}
    assert "native/helper.py" in found["code"][1] and "is of something else" in found["signature"][1]


def test_doctor_names_pickles_and_configs_that_ask_for_code(effc, artifact, tmp_path):  # noqa: F811
    shutil.copytree(artifact, folder := tmp_path / "copy")
    (folder / "native" / "more.bin").write_bytes(b"\x80\x04N.")
    (folder / "native" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.Evil"}}')
    run = effc("doctor", "--trust", str(folder))
    assert run.code == 5 and "native/more.bin: effc would not read it" in run.out
    assert "native/tokenizer_config.json asks for code of its author" in run.out
    assert effc("doctor", "--trust", str(tmp_path)).code == 5


@pytest.mark.parametrize(("name", "content"), [(".evil.pkl", b"\x80\x04N."), (".a/b", b"\x80\x04N."), ("c.pkl", b"N.")])
def test_doctor_names_pickles_that_no_hash_covers_and_those_that_their_name_tells(effc, tmp_path, name, content):  # noqa: F811
    with tarfile.open(STORED / "kinds.tar.xz") as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.startswith("kinds/int4/")], filter="data")
    file = tmp_path / "kinds" / "int4" / "native" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    run = effc("doctor", "--trust", str(tmp_path / "kinds" / "int4"), "--format", "json")
    found = {c["topic"]: (c["state"], c["fact"]) for c in json.loads(run.out)["checks"]}
    assert run.code == 5 and found["pickles"] == ("bad", f"native/{name}: effc would not read it")


@pytest.mark.parametrize(
    "kind", ["front", "family", "adapters", "peft", "reft", "flower", "rttc", "onnx", "gguf", "int4"]
)
def test_doctor_knows_what_becomes_of_each_folder_that_a_target_writes(effc, kind, tmp_path):  # noqa: F811
    with tarfile.open(STORED / "kinds.tar.xz") as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.startswith(f"kinds/{kind}/")], filter="data")
    run = effc("doctor", "--trust", str(tmp_path / "kinds" / kind), "--format", "json")
    found = {c["topic"]: (c["state"], c["fact"]) for c in json.loads(run.out)["checks"]}
    assert run.code == 0 and not any("nothing that effc loads" in fact for _, fact in found.values()), found
    assert found["forms"][0] == ("ok" if kind != "flower" else found["forms"][0])


def test_doctor_tells_a_form_that_effc_would_refuse(effc, tmp_path):  # noqa: F811
    with tarfile.open(STORED / "kinds.tar.xz") as archive:
        archive.extractall(tmp_path, [m for m in archive if m.name.startswith("kinds/int4/")], filter="data")
    plan = tmp_path / "kinds" / "int4" / "native" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"plan": {"version": 99}}))
    consistent(tmp_path / "kinds" / "int4")
    run = effc("doctor", "--trust", str(tmp_path / "kinds" / "int4"), "--format", "json")
    states = {c["topic"]: c["state"] for c in json.loads(run.out)["checks"]}
    assert run.code == 5 and (states["files"], states["forms"]) == ("ok", "bad")


def test_files_that_no_hash_covers_are_named_wherever_an_artifact_is_checked(effc, signed, keys):  # noqa: F811
    assert "covers" not in (clean := effc("verify", signed, "--require-signature", keys[1])).out + clean.err
    for name in (".env", ".git/config", "native/.cache/x", "native/__pycache__/y.pyc", "native/.a\x1b[2J\nforged"):
        (signed / name).parent.mkdir(parents=True, exist_ok=True)
        (signed / name).write_text("x")
    fact = "no hash and no signature covers .env, .git, native/."
    for command in (
        ("verify", signed),
        ("verify", signed, "--require-signature", keys[1]),
        ("sign", signed, "--require-signature", keys[1]),
        ("inspect", signed, "--require-signature", keys[1]),
        ("inspect", signed / "native", "--require-signature", keys[1]),
        ("doctor", "--trust", signed),
    ):
        run = effc(*command)
        said = run.out + run.err
        assert run.code == 0 and fact in said and " and 2 more, and effc opens none of them" in said, said
        assert "\x1b[2J" not in said and "\nforged" not in said
    names = json.loads(effc("verify", signed, "--format", "json").out)["uncovered"]
    assert names == [".env", ".git", "native/.a\x1b[2J\nforged", "native/.cache", "native/__pycache__"]
    checks = json.loads(effc("doctor", "--trust", signed, "--format", "json").out)["checks"]
    topics = [check["topic"] for check in checks]
    assert topics.index("signature") < topics.index("files") < topics.index("uncovered")
    assert "no others" not in json.dumps(checks) or "effc opens no others" in json.dumps(checks)


def test_doctor_checks_the_signature_before_it_reads_the_files_that_are_signed(effc, signed, keys):  # noqa: F811
    reading, watching = [], True

    def watch(event, args):  # hooks stay until the process ends
        if watching and event == "open":
            reading.append(str(args[0]))

    sys.addaudithook(watch)
    effc("doctor", "--trust", signed, "--format", "json")
    watching = False
    files = [name.removeprefix(f"{signed}/") for name in reading if name.startswith(f"{signed}/")]
    assert files.index("signatures.json") < min(i for i, name in enumerate(files) if name.startswith("native/"))
