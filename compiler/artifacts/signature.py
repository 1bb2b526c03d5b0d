"""Signatures of an artifact: who vouches for it, checked offline against a key that the reader already has.

A key of P-256, P-384 or P-521 signs `model.sig` (`signature_bundle.py`), which other tools check as well; it has one
signature. An Ed25519 key signs `signatures.json`, which has one of each key: over a short text of the hashes of
`manifest.json` (which holds the hash of every file that is read), of `measures.json` and of `sbom.json`, the time, the
provenance (`provenance.py`) and the signer's note. The model card may be edited.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...dsl.syntax.diagnostics import Fault, Reject
from ..core.cache import write_atomic
from ..core.json_errors import reject_on_error
from ..core.safe_read import read_json
from .manifest import BUNDLE, SIGNATURES, file_sha256, read_manifest, readable_json_bytes, verify_files
from .provenance import provenance_statement
from .signature_bundle import (
    MAX_NOTE,
    SIGNED,
    base64_field,
    check_signed_fields,
    json_field,
    read_bundle,
    read_statement,
    signed_files_problem,
    write_bundle,
)
from .signing_keys import (
    ED25519,
    canonical_key_text,
    key_digest,
    public_key_of_text,
    public_key_text,
    read_secret_key,
    read_trusted_keys,
    unsigned,
)

FORMAT = 2  # 1 has no time of signing
_MAX_BYTES, _MAX_SIGNATURES = 1 << 20, 32  # of the file, and signatures in it

already_signed = Fault(
    "already-signed",
    "An artifact has a signature of another key, and a file that holds one.\n\n"
    "`model.sig` has one signature. Keys of Ed25519 sign `signatures.json`, which has one of each.",
    exit="usage",
)


@dataclass(frozen=True)
class Signature:
    """One of an artifact.

    key          public key, as text
    note         what the signer says of it
    signed       time by the signer's clock, in ISO 8601; "" in format 1
    provenance   in-toto statement; {} in format 1
    """

    key: str
    value: bytes
    note: str = ""
    signed: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)


def sign_artifact(artifact: Path, secret_key_path: Path, note: str = "") -> Signature:
    """Sign an artifact whose files are those of its manifest; a signature that the key gave before goes."""
    secret = read_secret_key(secret_key_path)
    manifest = read_manifest(artifact)
    verify_files(artifact, manifest)
    if len(note) > MAX_NOTE:
        raise unsigned(
            f"the note has {len(note)} characters, and at most {MAX_NOTE} are kept with a signature"
        ).rejection()
    key, time = public_key_text(secret.public_key()), datetime.now(UTC).isoformat(timespec="seconds")
    provenance = provenance_statement(artifact, manifest)
    if key.startswith(f"{ED25519}:"):
        signature = Signature(key, secret.sign(bytes_to_sign(artifact, note, time, provenance)), note, time, provenance)
        _write_signature(artifact, signature)
        return signature
    _refuse_bundle_of_another_key(artifact, key)
    value = write_bundle(artifact, secret, manifest, signed_at=time, note=note, provenance=provenance)
    return Signature(key, value, note, time, provenance)


def _refuse_bundle_of_another_key(artifact: Path, key: str) -> None:
    try:
        bundle = read_bundle(artifact)
        signer = f"the key {bundle.key_id}" if bundle is not None and bundle.hint != key_digest(key) else ""
    except Reject:
        signer = "what is no key that effc knows"
    if signer:
        raise already_signed(
            f"{artifact / BUNDLE} is signed by {signer}, and has one signature",
            help="remove it, or sign beside it with a key of `effc sign --new-key FILE --key-type ed25519`",
        ).rejection()


def _write_signature(artifact: Path, signature: Signature) -> None:
    remaining = [s for s in read_signatures(artifact) if s.key != signature.key]
    body = [{**vars(s), "signature": base64.b64encode(s.value).decode()} for s in (*remaining, signature)]
    for entry in body:
        del entry["value"]
    content = readable_json_bytes({"format": FORMAT, "signatures": body})
    if len(body) > _MAX_SIGNATURES or len(content) > _MAX_BYTES:
        raise unsigned(
            f"{artifact} holds as many signatures as can be read: {_MAX_SIGNATURES}, of {_MAX_BYTES} bytes together",
            help=f"remove {artifact / SIGNATURES}, or older entries of it",
        ).rejection()
    write_atomic(artifact / SIGNATURES, content)


def find_valid_signer(artifact: Path, keys: Sequence[str]) -> str:
    """The first of the keys, or of those in files, that signed an artifact as it is now; Reject where none did.

    Says nothing of the other files: the manifest that was signed holds their hashes, and `verify_files` compares.
    """
    trusted, present, objections = read_trusted_keys(keys), read_signatures(artifact), []
    for key in trusted.values():
        for signature in present:
            if signature.key == key.text and is_valid_signature(signature, artifact):
                if not (objection := key.rejection_reason(signature.signed)):
                    return key.text
                objections.append(objection)
    bundle, problem = read_bundle(artifact), ""
    for key in trusted.values():
        if bundle is None or not bundle.is_signed_by(key.text):
            continue
        files = read_statement(bundle, artifact)
        if problem := signed_files_problem(artifact, files):
            break
        if not (objection := key.rejection_reason(files.signed)):
            return key.text
        objections.append(objection)
    signers = [s.key for s in present] + ([f"the key {bundle.key_id}"] if bundle else [])
    if objections:
        reason, help = f"{artifact} is signed, but {objections[0]}", "ask its author for a newer one"
    elif not signers:
        reason, help = f"{artifact} is not signed", "sign it with `effc sign`, or use it without --require-signature"
    elif problem or any(s.key in trusted for s in present) or (bundle and bundle.hint in map(key_digest, trusted)):
        reason = f"{artifact} was signed, and has changed since{f': {problem}' if problem else ''}"
        help = "fetch it again, or have it signed again"
    else:
        reason, help = f"{artifact} is signed by {', '.join(signers)}, which is another key", ""
    raise unsigned(reason, help=help).rejection()


def is_valid_signature(signature: Signature, artifact: Path) -> bool:
    """Whether a signature is of the artifact as it is now."""
    key = public_key_of_text(signature.key)
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature.value, bytes_to_sign(artifact, signature.note, signature.signed, signature.provenance))
    except InvalidSignature:
        return False
    return True


def bytes_to_sign(
    artifact: Path, note: str = "", signed_at: str = "", provenance: Mapping[str, Any] | None = None
) -> bytes:
    """Bytes that are signed; of format 1 without time and provenance."""
    lines = [f"effc artifact signature {FORMAT if signed_at else 1}"]
    lines += [f"{name} {file_sha256(artifact / name) if (artifact / name).is_file() else 'absent'}" for name in SIGNED]
    if signed_at:
        lines += [
            f"signed {json.dumps(signed_at)}",
            f"provenance {hashlib.sha256(readable_json_bytes(provenance or {})).hexdigest()}",
        ]
    return ("\n".join([*lines, f"note {json.dumps(note)}"]) + "\n").encode()


def read_signatures(artifact: Path) -> list[Signature]:
    """Read the signatures of an artifact, unchecked; Reject a file that is no list of them."""
    file = artifact / SIGNATURES
    if not file.is_file():
        return []
    with reject_on_error(unsigned, f"{file} holds no signatures", "fetch it again"):
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        body = read_json(file, _MAX_BYTES, artifact)
        entries = json_field(body, "signatures", list)
        if json_field(body, "format", int) not in (1, FORMAT) or len(entries) > _MAX_SIGNATURES:
            raise ValueError(f"format {FORMAT} has at most {_MAX_SIGNATURES} signatures")
        return [_parse_signature(entry) for entry in entries]


def _parse_signature(entry: Any) -> Signature:
    key, note, encoded = (json_field(entry, name, str) for name in ("key", "note", "signature"))
    signed, provenance = entry.get("signed", ""), entry.get("provenance") or {}
    if unknown := entry.keys() - {"key", "note", "signature", "signed", "provenance"}:
        raise ValueError(f"`{min(unknown)[:80]}` means nothing in a signature")
    check_signed_fields(signed, note, provenance)
    if provenance and not signed:
        raise ValueError("format 1 signs no provenance")
    if not key.startswith(f"{ED25519}:"):
        raise ValueError(f"its keys are of {ED25519}")
    return Signature(canonical_key_text(key), base64_field(encoded, "signature"), note, signed, provenance)
