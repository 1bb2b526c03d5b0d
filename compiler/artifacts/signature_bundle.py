"""`model.sig`: a signature as OpenSSF Model Signing has it, which `model_signing verify key` checks.

A sigstore bundle: a DSSE envelope over an in-toto statement that lists the SHA-256 of every file, signed with ECDSA
over P-256, P-384 or P-521. Time, note and provenance are a further field of its predicate, `effc`, which verifiers of
version 1.0 pass over. Bundles of other tools are taken as well, where a key signed them; a certificate is not.
Source: OpenSSF Model Signing, predicate v1.0 (github.com/sigstore/model-transparency); DSSE v1.0.0; in-toto
Statement v1; sigstore bundle v0.3.
"""

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ..core.cache import write_atomic
from ..core.json_errors import reject_on_error
from ..core.safe_read import CONFIG, open_regular, parse_strict_json, read_json, refuse_irregular_file
from .manifest import (
    BUNDLE,
    CARD,
    MEASURES,
    NAME,
    SBOM,
    SIGNATURES,
    Manifest,
    check_inner_file_name,
    file_sha256,
    is_hidden,
    read_manifest,
    readable_json_bytes,
)
from .manifest_form import is_plain_text
from .signing_keys import CURVES, ED25519, canonical_key_text, key_digest, public_key_of_text, public_key_text, unsigned

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_EFFC = "effc"  # field of the predicate: {"key", "signed", "note", "provenance"}
_ALGORITHMS = ("sha256", "blake2b")
SIGNED = (NAME, MEASURES, SBOM)  # by a signature itself; all other files by the hashes of the manifest
_IGNORED = (CARD, BUNDLE, SIGNATURES, ".cache", ".git", ".gitattributes", ".github", ".gitignore")
MAX_NOTE = 1 << 14  # characters
_MAX_TIME = 32  # characters


@dataclass(frozen=True)
class SignedFiles:
    """The statement of a bundle.

    digests      algorithm and hex digits by relative path
    key          public key that the signer names, as text; "" where the tool is another
    signed       time by the signer's clock, in ISO 8601
    """

    digests: Mapping[str, tuple[str, str]]
    key: str = ""
    signed: str = ""
    note: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """A bundle, unchecked: bytes that were signed, their signature, and the digest of the key's PEM, or ""."""

    payload: bytes
    value: bytes
    hint: str

    @property
    def key_id(self) -> str:
        return self.hint[:16] or "of no stated id"

    def is_signed_by(self, key: str) -> bool:
        """Whether the signature is by a public key."""
        name = key.partition(":")[0]
        if name == ED25519 or self.hint not in ("", key_digest(key)):
            return False
        from cryptography.exceptions import InvalidSignature

        try:
            public_key_of_text(key).verify(self.value, _dsse_preauth_encoding(self.payload), _ecdsa_algorithm(name))
        except InvalidSignature:
            return False
        return True


def write_bundle(
    path: Path, secret: Any, manifest: Manifest, *, signed_at: str, note: str, provenance: Mapping[str, Any]
) -> bytes:
    """Write `model.sig` of an artifact whose files are those of its manifest; return the signature's bytes."""
    key = public_key_text(secret.public_key())
    extension = {"key": key, "signed": signed_at, "note": note, "provenance": provenance}
    payload = readable_json_bytes(_in_toto_statement(path, manifest, extension))
    value = secret.sign(_dsse_preauth_encoding(payload), _ecdsa_algorithm(key.partition(":")[0]))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": _PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(value).decode(), "keyid": ""}],
    }
    material = {"publicKey": {"hint": key_digest(key)}, "tlogEntries": []}
    content = readable_json_bytes(
        {"mediaType": _MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
    )
    if len(content) > CONFIG:
        raise unsigned(f"{path} has too many files for {BUNDLE}, which can have {CONFIG} bytes").rejection()
    write_atomic(path / BUNDLE, content)
    return value


def _in_toto_statement(artifact: Path, manifest: Manifest, extension: Mapping[str, Any]) -> dict[str, Any]:
    digests = {name: sha for name, (_, sha) in manifest.files.items()}
    digests |= {name: file_sha256(artifact / name) for name in SIGNED if (artifact / name).is_file()}
    names = sorted(digests, key=PurePosixPath)
    serialization = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": sorted({*_IGNORED, *_hidden_paths(artifact)}),
    }
    resources = [{"name": name, "algorithm": "sha256", "digest": digests[name]} for name in names]
    subject = {
        "name": artifact.resolve().name,
        "digest": {"sha256": _sha256_of_digests(digests[name] for name in names)},
    }
    return {
        "_type": _STATEMENT_TYPE,
        "subject": [subject],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {"serialization": serialization, "resources": resources, _EFFC: extension},
    }


def _hidden_paths(artifact: Path) -> Iterator[str]:
    """Files and folders of an artifact that no hash covers, because nothing loads them."""
    for file in artifact.rglob("*"):
        parts = file.relative_to(artifact).parts
        if is_hidden(parts[-1]) and not any(map(is_hidden, parts[:-1])):
            yield "/".join(parts)


def _sha256_of_digests(digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _dsse_preauth_encoding(payload: bytes) -> bytes:
    """The payload with its type and lengths, as DSSE signs it."""
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _ecdsa_algorithm(key_type: str) -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.ECDSA(getattr(hashes, CURVES[key_type][1])())


def read_bundle(artifact: Path) -> Bundle | None:
    """The bundle of an artifact, unchecked; None where it has none. Raises Reject for a file of another form."""
    file = artifact / BUNDLE
    if not file.is_file():
        return None
    with reject_on_error(unsigned, f"{file} holds no signature by a key", "fetch it again"):
        return _parse_bundle(read_json(file, CONFIG, artifact))


def _parse_bundle(body: Any) -> Bundle:
    if json_field(body, "mediaType", str) != _MEDIA_TYPE:
        raise ValueError("it is no sigstore bundle of version 0.3")
    material = json_field(body, "verificationMaterial", dict)
    if "publicKey" not in material:
        raise ValueError("it was signed with a certificate, which `model_signing verify` checks")
    hint = json_field(material, "publicKey", dict).get("hint") or ""
    envelope = json_field(body, "dsseEnvelope", dict)
    if json_field(envelope, "payloadType", str) != _PAYLOAD_TYPE:
        raise ValueError("its payload is no in-toto statement")
    signatures = json_field(envelope, "signatures", list)
    if len(signatures) != 1:
        raise ValueError(f"it has {len(signatures)} signatures, and a bundle has one")
    if not isinstance(hint, str) or (hint and not _is_digest(hint, "sha256")):
        raise ValueError("its key has no SHA-256 as hint")
    payload = base64_field(json_field(envelope, "payload", str), "payload")
    return Bundle(payload, base64_field(json_field(signatures[0], "sig", str), "sig"), hint)


def read_statement(bundle: Bundle, artifact: Path) -> SignedFiles:
    """The files that a bundle vouches for. Raises Reject for a statement of another form."""
    with reject_on_error(
        unsigned, f"{artifact / BUNDLE} holds a statement that is not of {_PREDICATE_TYPE}", "fetch it again"
    ):
        return _parse_signed_files(parse_strict_json(bundle.payload))


def _parse_signed_files(body: Any) -> SignedFiles:
    if json_field(body, "_type", str) != _STATEMENT_TYPE or json_field(body, "predicateType", str) != _PREDICATE_TYPE:
        raise ValueError("its type or that of its predicate is another")
    subjects, predicate = json_field(body, "subject", list), json_field(body, "predicate", dict)
    if len(subjects) != 1:
        raise ValueError(f"it has {len(subjects)} subjects, and a model is one")
    serialization = json_field(predicate, "serialization", dict)
    if json_field(serialization, "method", str) != "files":
        raise ValueError("it lists shards of files, and effc compares whole files")
    digests: dict[str, tuple[str, str]] = {}
    for resource in json_field(predicate, "resources", list):
        name, algorithm = json_field(resource, "name", str), json_field(resource, "algorithm", str)
        digest = json_field(resource, "digest", str)
        if name in digests:
            raise ValueError(f"`{name[:80]}` stands twice in it")
        if algorithm not in _ALGORITHMS or not _is_digest(digest, algorithm):
            raise ValueError(f"`{name[:80]}` has no digest of {' or '.join(_ALGORITHMS)}")
        if PurePosixPath(check_inner_file_name(name)).as_posix() != name:
            raise ValueError(f"`{name[:80]}` is another spelling of a path")
        digests[name] = algorithm, digest
    root = json_field(json_field(subjects[0], "digest", dict), "sha256", str)
    if root != _sha256_of_digests(digest for _, digest in digests.values()):
        raise ValueError("the digest of its subject is not that of its files")
    if not is_plain_text([*digests]):
        raise ValueError("a name has control characters")
    extension = predicate.get(_EFFC)
    return SignedFiles(digests, **_parse_effc_extension(extension) if isinstance(extension, dict) else {})


def _parse_effc_extension(body: dict[str, Any]) -> dict[str, Any]:
    key, signed, note = (json_field(body, name, str) for name in ("key", "signed", "note"))
    provenance = json_field(body, "provenance", dict)
    check_signed_fields(signed, note, provenance)
    return {"key": canonical_key_text(key), "signed": signed, "note": note, "provenance": provenance}


def check_signed_fields(signed: Any, note: Any, provenance: Any) -> None:
    """Raises TypeError or ValueError for a time, a note or a provenance of another form than effc signs."""
    if not isinstance(signed, str) or not isinstance(note, str):
        raise TypeError("a signature's fields are texts")
    if not isinstance(provenance, Mapping) or not is_plain_text([signed, provenance]):
        raise TypeError("a provenance is an object without control characters")
    if len(signed) > _MAX_TIME:
        raise ValueError(f"a time has at most {_MAX_TIME} characters")
    readable_json_bytes(provenance)  # ValueError: it has no spelling that could be signed


def signed_files_problem(artifact: Path, files: SignedFiles) -> str:
    """Fact about the first file that is not as a statement has it; "" where all are.

    Content that the manifest records is compared with the manifest alone, because `verify_files` reads those files.
    Files that the statement leaves out are covered by the manifest, which it may not leave out.
    """
    for name in SIGNED:
        if (artifact / name).is_file() and name not in files.digests:
            return f"{BUNDLE} does not list {name}"
        if name in files.digests and (problem := _content_problem(artifact, name, *files.digests[name])):
            return problem
    recorded = read_manifest(artifact).files
    for name, (algorithm, digest) in files.digests.items():
        if algorithm == "sha256" and name in recorded and recorded[name][1] == digest:
            continue
        if name not in SIGNED and (problem := _content_problem(artifact, name, algorithm, digest)):
            return problem
    return ""


def _content_problem(artifact: Path, name: str, algorithm: str, digest: str) -> str:
    try:
        refuse_irregular_file(artifact / name, root=artifact)
        if (artifact / name).resolve() != artifact.resolve() / name:  # by links one file has any number of names
            return f"{name} is reached through a link"
        with open_regular(artifact / name) as file:
            actual = hashlib.file_digest(cast(io.BufferedReader, file), algorithm).hexdigest()
    except OSError:
        return f"{name} is missing"
    return "" if actual == digest else f"{name} has other content than {BUNDLE} lists"


def json_field(body: Any, name: str, kind: type) -> Any:
    """A field of a JSON object. Raises TypeError where it is missing or of another kind."""
    kinds: dict[type, str] = {str: "text", int: "number", list: "list", dict: "object"}
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, kind):
        raise TypeError(f"it has no {kinds[kind]} `{name}`")
    return value


def base64_field(encoded: str, name: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise ValueError(f"its `{name}` is no base64") from error


def _is_digest(text: str, algorithm: str) -> bool:
    return bool(re.fullmatch(f"[0-9a-f]{{{2 * hashlib.new(algorithm).digest_size}}}", text))
