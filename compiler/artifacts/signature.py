"""Signatures of an artifact: who vouches for it, checked offline against a key that the reader already has.

`signatures.json` lies beside the manifest. What is signed is a short text: the hashes of `manifest.json` (which holds
the hash of every file that is read), of `measures.json` and of `sbom.json`, and the signer's note. The model card may
be edited. Ed25519 (RFC 8032) through `cryptography`; a public key is one line, `ed25519:` and 32 bytes in base64.
"""

import base64
import binascii
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...dsl.syntax.diagnostics import Fault, Reject
from ..core.cache import write_atomic
from ..core.environment import check_modules
from ..core.safe_read import CONFIG, MALFORMED, read_json, read_regular_file
from .manifest import MEASURES, NAME, SBOM, SIGNATURES, dump, file_sha256, read_manifest, verify_files

FORMAT = 1
_KIND = "ed25519:"
_SIGNED = (NAME, MEASURES, SBOM)
_MAX_BYTES, _MAX_SIGNATURES = 64 * 1024, 32  # of the file, and signatures in it

bad_signing_key = Fault(
    "bad-signing-key",
    "A key for signatures can't be read, or is of another kind.\n\n"
    "`effc sign --new-key FILE` makes a pair: FILE is secret and signs, FILE.pub (one line that starts with "
    "`ed25519:`) is given to those who check.",
    exit="usage",
)
unsigned = Fault(
    "unsigned-artifact",
    "An artifact was to be used only if a key signed it, and that key did not.\n\n"
    "Either nobody signed it, or somebody else did, or what was signed has changed since. Whoever made the artifact "
    "signs it with `effc sign ARTIFACT --key FILE`.",
    exit="environment",
)


@dataclass(frozen=True)
class Signature:
    """One of an artifact. `key` is the public key, as text; `note` is what the signer said of it."""

    key: str
    value: bytes
    note: str = ""


def write_key_pair(file: Path) -> str:
    """Write a secret key that its owner alone can read, and beside it the public one, which is returned."""
    _check_library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    secret = Ed25519PrivateKey.generate()
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public = text_of(secret.public_key().public_bytes_raw())
        file.with_name(f"{file.name}.pub").write_text(public + "\n", encoding="ascii")
    except OSError as error:
        raise Reject(
            bad_signing_key(
                f"{file} can't be written: {(error.strerror or str(error)).lower()}",
                help="name a file that does not exist yet",
            )
        ) from error
    return public


def sign_artifact(path: Path, secret_file: Path, note: str = "") -> Signature:
    """Add a signature to an artifact whose files are those of its manifest; one that the key gave before goes."""
    secret = _read_secret_key(secret_file)
    verify_files(path, read_manifest(path))
    signature = Signature(text_of(secret.public_key().public_bytes_raw()), secret.sign(statement(path, note)), note)
    remaining = [s for s in read_signatures(path) if s.key != signature.key]
    body = [
        {"key": s.key, "signature": base64.b64encode(s.value).decode(), "note": s.note} for s in (*remaining, signature)
    ]
    write_atomic(path / SIGNATURES, dump({"format": FORMAT, "signatures": body}))
    return signature


def find_valid_signer(path: Path, keys: Sequence[str]) -> str:
    """The first of the keys, or files with them, that signed an artifact as it is now; Reject where none did.

    Says nothing of the other files: the manifest that was signed holds their hashes, and `verify_files` compares.
    """
    trusted = [text_of(read_public_key(key)) for key in keys]
    present = read_signatures(path)
    for key in trusted:
        if any(is_valid_signature(s, path) for s in present if s.key == key):
            return key
    if not present:
        reason, help = f"{path} is not signed", "sign it with `effc sign`, or use it without --require-signature"
    elif any(s.key in trusted for s in present):
        reason, help = f"{path} was signed, and has changed since", "fetch it again, or have it signed again"
    else:
        reason, help = f"{path} is signed by {', '.join(s.key for s in present)}, which is another key", ""
    raise Reject(unsigned(reason, help=help))


def is_valid_signature(signature: Signature, path: Path) -> bool:
    """Whether a signature is of the artifact as it is now."""
    _check_library()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(_public_key_bytes(signature.key))
        key.verify(signature.value, statement(path, signature.note))
    except InvalidSignature:
        return False
    return True


def statement(path: Path, note: str = "") -> bytes:
    """Bytes that are signed."""
    lines = [f"effc artifact signature {FORMAT}"]
    lines += [f"{name} {file_sha256(path / name) if (path / name).is_file() else 'absent'}" for name in _SIGNED]
    return ("\n".join([*lines, f"note {json.dumps(note)}"]) + "\n").encode()


def read_signatures(path: Path) -> list[Signature]:
    """Read the signatures of an artifact, unchecked; Reject a file that is no list of them."""
    file = path / SIGNATURES
    if not file.is_file():
        return []
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        body = read_json(file, _MAX_BYTES, path)
        if body["format"] != FORMAT or len(body["signatures"]) > _MAX_SIGNATURES:
            raise ValueError(f"format {FORMAT} has at most {_MAX_SIGNATURES} signatures")
        return [_signature(**entry) for entry in body["signatures"]]
    except (OSError, *MALFORMED) as error:
        raise Reject(unsigned(f"{file} holds no signatures: {error}", help="fetch it again")) from error


def _signature(key: Any, signature: Any, note: Any) -> Signature:
    if not all(isinstance(value, str) for value in (key, signature, note)):
        raise TypeError("a signature's fields are texts")
    value = base64.b64decode(signature, validate=True)
    return Signature(text_of(_public_key_bytes(key)), value, note)


def read_public_key(key: str) -> bytes:
    """The 32 bytes of a public key, given as text or as a file that holds the text."""
    text = key.strip()
    if not text.startswith(_KIND):
        try:
            text = read_regular_file(Path(key), 1024).decode("ascii").strip()
        except (OSError, ValueError) as error:
            reason = (getattr(error, "strerror", None) or "it is no text").lower()
            raise Reject(
                bad_signing_key(
                    f"`{key}` is no public key, and no file that holds one: {reason}",
                    help="give `ed25519:...`, or the FILE.pub that holds it",
                )
            ) from error
    try:
        return _public_key_bytes(text)
    except ValueError as error:
        raise Reject(
            bad_signing_key(f"`{key}` is no public key: {error}", help="it is one line, `ed25519:` and 44 characters")
        ) from error


def _public_key_bytes(text: str) -> bytes:
    if not text.startswith(_KIND):
        raise ValueError(f"it does not start with `{_KIND}`")
    try:
        raw = base64.b64decode(text.removeprefix(_KIND), validate=True)
    except binascii.Error as error:
        raise ValueError("it is no base64") from error
    if len(raw) != 32:
        raise ValueError(f"it has {len(raw)} bytes, and Ed25519's have 32")
    return raw


def text_of(raw: bytes) -> str:
    return _KIND + base64.b64encode(raw).decode()


def _read_secret_key(file: Path) -> Any:
    _check_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(read_regular_file(file, CONFIG), password=None)
    except OSError as error:
        raise Reject(
            bad_signing_key(
                f"{file} can't be read: {(error.strerror or str(error)).lower()}",
                help="`effc sign --new-key FILE` makes a key",
            )
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Reject(
            bad_signing_key(
                f"{file} is no secret key in PEM without a passphrase", help="`effc sign --new-key FILE` makes one"
            )
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Reject(bad_signing_key(f"{file} is no Ed25519 key", help="`effc sign --new-key FILE` makes one"))
    return key


def _check_library() -> None:
    check_modules(["cryptography"], "sign", "a signature")
