"""`model.sig` of OpenSSF Model Signing: their tool takes ours, ours takes theirs, and no bundle is believed untested."""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from effc.compiler.artifacts.load import verify_signature_and_files
from effc.compiler.artifacts.manifest import read_manifest
from effc.compiler.artifacts.signature import find_valid_signer, sign_artifact
from effc.compiler.artifacts.signature_bundle import read_bundle, read_statement, signed_files_problem
from effc.compiler.artifacts.signing_keys import key_id, read_trusted_keys, write_key_pair
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.cli.verbs.conftest import effc, own_cache  # noqa: F401
from tests.hostile.kinds import STORED

OPENSSF = STORED / "openssf"  # an artifact that `model_signing sign key` signed
TYPE = "application/vnd.in-toto+json"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(STORED / "kinds.tar.xz") as archive:
        archive.extractall(folder, [m for m in archive if m.name.startswith("kinds/gguf/")], filter="data")
    return folder / "kinds" / "gguf"


@pytest.fixture
def artifact(stored, tmp_path):
    return Path(shutil.copytree(stored, tmp_path / "artifact"))


@pytest.fixture
def key(tmp_path):
    return write_key_pair(tmp_path / "key")


@pytest.fixture
def signed(artifact, key, tmp_path):
    sign_artifact(artifact, tmp_path / "key", "nightly")
    return artifact


def rewrite(file: Path, change) -> None:
    """Change a JSON file in place."""
    body = json.loads(file.read_text())
    change(body)
    file.write_text(json.dumps(body))


def statement_of(artifact: Path) -> dict[str, Any]:
    return json.loads(base64.b64decode(json.loads((artifact / "model.sig").read_text())["dsseEnvelope"]["payload"]))


def root_digest(statement: dict[str, Any]) -> str:
    """As theirs computes it."""
    resources = statement["predicate"]["resources"]
    return hashlib.sha256(b"".join(bytes.fromhex(r["digest"]) for r in resources)).hexdigest()


def sign_statement(artifact: Path, secret_file: Path, statement: Any) -> None:
    """Sign any statement, as whoever has a trusted key could."""
    secret: Any = serialization.load_pem_private_key(secret_file.read_bytes(), password=None)
    payload = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
    value = secret.sign(f"DSSEv1 {len(TYPE)} {TYPE} {len(payload)} ".encode() + payload, ec.ECDSA(hashes.SHA256()))

    def change(body):
        body["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        body["dsseEnvelope"]["signatures"] = [{"sig": base64.b64encode(value).decode()}]

    rewrite(artifact / "model.sig", change)


def refusal(effc, artifact: Path, key: str) -> str:  # noqa: F811
    """The one error of a check of the signature."""
    run = effc("sign", artifact, "--require-signature", key)
    (error,) = [line for line in run.err.splitlines() if line.startswith("error[")]
    assert run.code == 5, run.err
    return error


@pytest.mark.parametrize("key_type", ["p256", "p384", "p521"])
def test_their_tool_verifies_what_effc_signed_and_sees_every_change(artifact, tmp_path, key_type):
    verifying = pytest.importorskip("model_signing.verifying")
    write_key_pair(tmp_path / "key", key_type)
    write_key_pair(tmp_path / "other", key_type)
    (artifact / ".cache" / "huggingface").mkdir(parents=True)
    (artifact / "gguf" / ".notes").write_text("nobody loads it")
    sign_artifact(artifact, tmp_path / "key", "nightly")
    (artifact / "README.md").write_text("edited")
    (artifact / ".cache" / "huggingface" / "download").write_text("by the hub's client")

    def verify(name: str = "key") -> None:
        config = verifying.Config().use_elliptic_key_verifier(public_key=tmp_path / f"{name}.pub")
        config.verify(artifact, artifact / "model.sig")

    verify()
    with pytest.raises(ValueError):
        verify("other")
    files = [f for f in artifact.rglob("*") if f.is_file() and not set(f.parts) & {"README.md", ".cache", ".notes"}]
    assert len(files) > 5
    for file in files:
        before = file.read_bytes()
        file.write_bytes(before[:-2] + b"~" + before[-1:])
        with pytest.raises((ValueError, InvalidSignature)):
            verify()
        file.write_bytes(before)
    (artifact / "gguf" / "extra").write_text("")
    with pytest.raises(ValueError, match="extra"):
        verify()


@pytest.mark.parametrize("algorithm", ["sha256", "blake2"])
def test_effc_verifies_what_their_tool_signed(effc, artifact, key, tmp_path, algorithm):  # noqa: F811
    signing, hashing = pytest.importorskip("model_signing.signing"), pytest.importorskip("model_signing.hashing")
    ignoring = hashing.Config().use_file_serialization(hashing_algorithm=algorithm)
    ignoring.set_ignored_paths(paths=[artifact / "model.sig"])
    signer = signing.Config().set_hashing_config(ignoring).use_elliptic_key_signer(private_key=tmp_path / "key")
    signer.sign(artifact, artifact / "model.sig")
    run = effc("sign", artifact, "--require-signature", tmp_path / "key.pub")
    assert run.code == 0 and f"is signed by {key}" in run.out
    (artifact / "README.md").write_text("edited")
    assert "README.md has other content than model.sig lists" in refusal(effc, artifact, key)


def test_effc_verifies_a_bundle_that_their_tool_wrote_earlier(effc, tmp_path):  # noqa: F811
    folder = Path(shutil.copytree(OPENSSF / "artifact", tmp_path / "copy"))
    run = effc("sign", folder, "--require-signature", OPENSSF / "release.pub", "--format", "json")
    assert run.code == 0 and json.loads(run.out)["outcome"] == "signed"
    trust = effc("doctor", "--trust", folder, "--format", "json")
    (fact,) = [c["fact"] for c in json.loads(trust.out)["checks"] if c["topic"] == "signature"]
    assert fact.startswith(f"it names the key {json.loads(run.out)['id']}; check it by that key")
    (folder / "model" / "words.txt").write_text("others")
    assert "words.txt has" in refusal(effc, folder, str(OPENSSF / "release.pub"))


def test_a_signature_lists_every_file_but_those_that_change_later(signed, key):
    statement = statement_of(signed)
    names = [r["name"] for r in statement["predicate"]["resources"]]
    files = {f.relative_to(signed).as_posix() for f in signed.rglob("*") if f.is_file()}
    assert {*names} == files - {"README.md", "model.sig"} and len(names) == len({*names})
    assert statement["subject"] == [{"name": "artifact", "digest": {"sha256": root_digest(statement)}}]
    assert statement["predicate"]["effc"]["note"] == "nightly" and statement["predicate"]["effc"]["key"] == key
    assert statement["predicate"]["effc"]["provenance"]["predicateType"] == "https://slsa.dev/provenance/v1"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_the_signature_with_the_public_file(signed, tmp_path):
    envelope = json.loads((signed / "model.sig").read_text())["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    (tmp_path / "signed").write_bytes(f"DSSEv1 {len(TYPE)} {TYPE} {len(payload)} ".encode() + payload)
    (tmp_path / "value").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    words = ["openssl", "dgst", "-sha256", "-verify", "key.pub", "-signature", "value", "signed"]
    assert b"Verified OK" in subprocess.run(words, cwd=tmp_path, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: (a / "measures.json").write_bytes(b"{}"), "measures.json has other content than model.sig lists"),
        (lambda a: (a / "sbom.json").unlink(), "sbom.json is missing"),
        (lambda a: (a / "manifest.json").write_bytes(b"{"), "manifest.json has other content than model.sig lists"),
        (lambda a: (a / "gguf" / "model.gguf").write_bytes(b"x"), "model.gguf has 1 bytes"),
        (lambda a: (a / "gguf" / "model.gguf").unlink(), "model.gguf is missing"),
        (lambda a: (a / "gguf" / "more").write_bytes(b"x"), "gguf/more is not in the manifest"),
    ],
)
def test_a_file_that_changed_after_the_signature_is_named(effc, signed, key, change, words):  # noqa: F811
    assert verify_signature_and_files(signed, [key]) == key
    change(signed)
    assert words in refusal(effc, signed, key)


def test_files_that_a_statement_leaves_out_are_those_of_the_manifest_it_lists(signed, key, tmp_path):
    statement = statement_of(signed)
    predicate = statement["predicate"]
    predicate["resources"] = [r for r in predicate["resources"] if r["name"] != "gguf/model.gguf"]
    statement["subject"][0]["digest"]["sha256"] = root_digest(statement)
    sign_statement(signed, tmp_path / "key", statement)
    assert verify_signature_and_files(signed, [key]) == key
    (signed / "gguf" / "model.gguf").write_bytes(b"x")
    with pytest.raises(Reject, match=r"model\.gguf has 1 bytes"):
        verify_signature_and_files(signed, [key])


def test_a_link_out_of_the_artifact_is_neither_a_signature_nor_a_signed_file(effc, signed, key, tmp_path):  # noqa: F811
    for name in ("measures.json", "model.sig"):
        (signed / name).rename(tmp_path / name)
        (signed / name).symlink_to(tmp_path / name)
        assert "is a link that leads out of" in refusal(effc, signed, key)


ENVELOPES = {
    "mediaType": (lambda b: b.update(mediaType="application/json"), "no sigstore bundle of version 0.3"),
    "no envelope": (lambda b: b.pop("dsseEnvelope"), "it has no object `dsseEnvelope`"),
    "a list": (lambda b: b.update(verificationMaterial=[]), "it has no object `verificationMaterial`"),
    "certificate": (
        lambda b: b.update(verificationMaterial={"certificate": {"rawBytes": ""}}),
        "signed with a certificate",
    ),
    "hint": (lambda b: b["verificationMaterial"]["publicKey"].update(hint="x"), "its key has no SHA-256 as hint"),
    "payloadType": (lambda b: b["dsseEnvelope"].update(payloadType="text/plain"), "no in-toto statement"),
    "payload": (lambda b: b["dsseEnvelope"].update(payload="!"), "its `payload` is no base64"),
    "sig": (lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="é"), "its `sig` is no base64"),
    "two": (lambda b: b["dsseEnvelope"]["signatures"].append({}), "it has 2 signatures"),
    "none": (lambda b: b["dsseEnvelope"].update(signatures=[]), "it has 0 signatures"),
}


@pytest.mark.parametrize("name", ENVELOPES)
def test_a_bundle_of_another_form_is_one_sentence(effc, signed, key, name):  # noqa: F811
    change, words = ENVELOPES[name]
    rewrite(signed / "model.sig", change)
    error = refusal(effc, signed, key)
    assert "model.sig holds no signature by a key: " in error and words in error
    assert effc("doctor", "--trust", signed).code == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no signature"),
        (b"[]", "it has no text `mediaType`"),
        (b"\xff", "holds no signature"),
        (b'{"mediaType": "a", "mediaType": "b"}', "stands twice"),
        (b"[" * 60_000, "nested too deep"),
        (b" " * (17 << 20), "more than such a file can have"),
    ],
)
def test_a_file_that_is_no_bundle_is_one_sentence(effc, signed, key, content, words):  # noqa: F811
    (signed / "model.sig").write_bytes(content)
    assert words in refusal(effc, signed, key)


def resource(name: str, algorithm: str = "sha256", digest: str = "0" * 64) -> dict[str, str]:
    return {"name": name, "algorithm": algorithm, "digest": digest}


STATEMENTS = {
    "_type": (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "its type or that of its predicate"),
    "predicate": (lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"), "its type or that of its"),
    "subjects": (lambda s: s["subject"].append(s["subject"][0]), "it has 2 subjects"),
    "no subject": (lambda s: s["subject"].clear(), "it has 0 subjects"),
    "digest": (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "is not that of its files"),
    "shards": (lambda s: s["predicate"]["serialization"].update(method="shards"), "shards of files"),
    "climbing": (lambda s: s["predicate"]["resources"].append(resource("../key")), "leads outside the artifact"),
    "absolute": (lambda s: s["predicate"]["resources"].append(resource("/etc/hosts")), "leads outside the artifact"),
    "spelling": (lambda s: s["predicate"]["resources"].append(resource("./sbom.json")), "another spelling of a path"),
    "duplicate": (lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]), "stands twice in it"),
    "control": (lambda s: s["predicate"]["resources"].append(resource("a\x1b[2J")), "control characters"),
    "algorithm": (lambda s: s["predicate"]["resources"].append(resource("a", "md5", "0" * 32)), "has no digest of"),
    "length": (lambda s: s["predicate"]["resources"].append(resource("a", digest="0" * 62)), "has no digest of"),
    "resources": (lambda s: s["predicate"].pop("resources"), "it has no list `resources`"),
    "time": (lambda s: s["predicate"]["effc"].update(signed="9" * 99), "a time has at most"),
    "key": (lambda s: s["predicate"]["effc"].update(key="p256:AAAA"), "it has 3 bytes"),
    "note": (lambda s: s["predicate"]["effc"].update(note=3), "it has no text `note`"),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_signed_statement_of_another_form_is_one_sentence(effc, signed, key, tmp_path, name):  # noqa: F811
    change, words = STATEMENTS[name]
    statement = statement_of(signed)
    change(statement)
    if name not in ("digest", "subjects", "no subject", "resources"):
        statement["subject"][0]["digest"]["sha256"] = root_digest(statement)
    sign_statement(signed, tmp_path / "key", statement)
    error = refusal(effc, signed, key)
    assert "holds a statement that is not of https://model_signing/signature/v1.0: " in error and words in error
    assert "\x1b" not in error


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b'{"_type": 1, "_type": 2}', b"[" * 60_000, b"\xff"])
def test_a_signed_payload_that_is_no_statement_is_one_sentence(effc, signed, key, tmp_path, payload):  # noqa: F811
    sign_statement(signed, tmp_path / "key", payload)
    assert "holds a statement that is not of" in refusal(effc, signed, key)


@pytest.mark.parametrize("name", ["manifest.json", "measures.json", "sbom.json"])
def test_a_statement_may_not_leave_out_what_says_what_an_artifact_is(effc, signed, key, tmp_path, name):  # noqa: F811
    statement = statement_of(signed)
    predicate = statement["predicate"]
    predicate["resources"] = [r for r in predicate["resources"] if r["name"] != name]
    statement["subject"][0]["digest"]["sha256"] = root_digest(statement)
    sign_statement(signed, tmp_path / "key", statement)
    assert f"model.sig does not list {name}" in refusal(effc, signed, key)


def test_a_statement_that_was_edited_is_not_signed(effc, signed, key):  # noqa: F811
    statement = statement_of(signed)
    statement["predicate"]["effc"]["note"] = "another"
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    rewrite(signed / "model.sig", lambda b: b["dsseEnvelope"].update(payload=payload))
    assert "was signed, and has changed since" in refusal(effc, signed, key)
    run = effc("doctor", "--trust", signed)
    assert run.code == 5 and "is of something else" in run.out and "built by" not in run.out


def test_a_bundle_by_another_key_is_refused_with_its_id(effc, signed, key, tmp_path):  # noqa: F811
    other = write_key_pair(tmp_path / "other")
    assert f"is signed by the key {key_id(key)}, which is another key" in refusal(effc, signed, other)
    hint = json.loads((signed / "model.sig").read_text())["verificationMaterial"]["publicKey"]["hint"]
    assert hint == hashlib.sha256((tmp_path / "key.pub").read_bytes()).hexdigest() and hint[:16] == key_id(key)
    rewrite(signed / "model.sig", lambda b: b["verificationMaterial"]["publicKey"].pop("hint"))
    assert find_valid_signer(signed, [other, key]) == key
    assert "which is another key" in refusal(effc, signed, other)


def test_a_second_key_does_not_replace_the_first_ones_bundle(effc, signed, key, tmp_path):  # noqa: F811
    write_key_pair(tmp_path / "other")
    before = (signed / "model.sig").read_bytes()
    run = effc("sign", signed, "--key", "other")
    assert run.code == 2 and f"signed by the key {key_id(key)}, and has one signature" in run.err
    assert (signed / "model.sig").read_bytes() == before
    assert effc("sign", signed, "--key", "key").code == 0 and (signed / "model.sig").read_bytes() != before


def test_a_bundle_that_is_by_no_key_is_not_replaced(effc, signed):  # noqa: F811
    rewrite(signed / "model.sig", ENVELOPES["certificate"][0])
    run = effc("sign", signed, "--key", "key")
    assert run.code == 2 and "signed by what is no key that effc knows" in run.err


def test_a_folder_that_links_to_itself_gives_no_file_a_second_name(signed):
    (signed / "again").symlink_to(signed)
    name = f"again/{next(iter(read_manifest(signed).files))}"
    files = read_statement(read_bundle(signed), signed)
    files = replace(files, digests={**files.digests, name: ("sha256", "0" * 64)})
    assert signed_files_problem(signed, files) == f"{name} is reached through a link"


def test_a_bundle_and_signatures_of_other_keys_stand_beside_each_other(effc, signed, key, tmp_path):  # noqa: F811
    other = json.loads(effc("sign", "--new-key", "ed", "--key-type", "ed25519", "--format", "json").out)["key"]
    assert other.startswith("ed25519:") and effc("sign", signed, "--key", "ed").code == 0
    for one in (key, other):
        assert find_valid_signer(signed, [one]) == one
    (signed / "model.sig").write_bytes(b"{}")
    assert find_valid_signer(signed, [other, key]) == other
    assert effc("sign", "--new-key", "new", "--key-type", "rsa").code == 2 and not (tmp_path / "new").exists()


def test_a_key_is_the_same_as_text_and_as_pem_and_takes_conditions_in_a_list(effc, signed, key, tmp_path):  # noqa: F811
    pem = (tmp_path / "key.pub").read_text()
    assert [*read_trusted_keys([str(tmp_path / "key.pub")])] == [*read_trusted_keys([key])] == [key]
    other = write_key_pair(tmp_path / "other", "p384")
    (tmp_path / "list").write_text(f"# ours\n{other}\n{pem}\n{key} since=2999-01-01\n")
    assert "and signatures since 2999-01-01 are taken" in refusal(effc, signed, str(tmp_path / "list"))
    (tmp_path / "list").write_text(f"{pem}{other} revoked\n")
    assert find_valid_signer(signed, [str(tmp_path / "list")]) == key


def test_a_bundle_without_a_time_counts_as_older_than_any_day(effc, signed, key, tmp_path):  # noqa: F811
    statement = statement_of(signed)
    del statement["predicate"]["effc"]
    sign_statement(signed, tmp_path / "key", statement)
    assert find_valid_signer(signed, [key]) == key
    (tmp_path / "list").write_text(f"{key} since=2020-01-01\n")
    assert "signed it at no stated time" in refusal(effc, signed, str(tmp_path / "list"))


@pytest.mark.parametrize("kind", ["rsa", "secp256k1", "certificate", "point", "short"])
def test_keys_that_sign_no_bundle_are_refused_as_mistakes_of_the_command_line(effc, signed, tmp_path, kind):  # noqa: F811
    secret: Any = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256K1())
    pem = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = secret.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "bad").write_bytes(pem)
    texts = {
        "certificate": public.replace(b"PUBLIC KEY", b"CERTIFICATE"),
        "point": b"p256:" + base64.b64encode(b"\x02" + b"\xff" * 32),
        "short": b"p384:AAAA",
    }
    (tmp_path / "bad.pub").write_bytes(texts.get(kind, public))
    run = effc("sign", signed, "--require-signature", tmp_path / "bad.pub")
    assert run.code == 2 and "error[bad-signing-key]" in run.err
    run = effc("sign", signed, "--key", tmp_path / "bad")
    assert run.code == 2 and "its key is none of P-256, P-384, P-521 and Ed25519" in run.err
