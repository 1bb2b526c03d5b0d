"""Signatures of an artifact: who vouches for it, checked offline against a key that the reader already has.

`signatures.json` lies beside the manifest. What is signed is a short text: the hashes of `manifest.json` (which holds
the hash of every file that is read), of `measures.json` and of `sbom.json`, the time, the provenance (`provenance.py`)
and the signer's note. The model card may be edited. Ed25519 (RFC 8032) through `cryptography`; a public key is one
line, `ed25519:` and 32 bytes in base64.
"""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from ...dsl.syntax.diagnostics import Fault
from ..core.cache import write_atomic
from ..core.environment import check_modules
from ..core.safe_read import CONFIG, MALFORMED, read_json, read_regular_file
from .manifest import MEASURES, NAME, SBOM, SIGNATURES, dump, file_sha256, read_manifest, verify_files
from .manifest_form import is_plain_text
from .provenance import provenance_statement

FORMAT = 2  # 1 has no time of signing
_KIND = "ed25519:"
_SIGNED = (NAME, MEASURES, SBOM)
_MAX_BYTES, _MAX_SIGNATURES = 1 << 20, 32  # of the file, or one of keys, and signatures in it
_MAX_NOTE = 1 << 14  # characters
_MAX_TIME = 32  # characters

invalid_signing_key = Fault(
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


@dataclass(frozen=True)
class TrustedKey:
    """A public key and what of its signatures is taken: a line `ed25519:... until=DAY since=DAY revoked` of a file.

    until     after that day, nothing
    since     what was signed on that day or later, so that no older version passes for a newer one
    revoked   nothing
    """

    text: str
    until: date | None = None
    since: date | None = None
    revoked: bool = False

    def stricter(self, other: "TrustedKey") -> "TrustedKey":
        """The key with the conditions of two lines, both of which count."""
        until, since = ([d for d in pair if d] for pair in ((self.until, other.until), (self.since, other.since)))
        return TrustedKey(self.text, min(until, default=None), max(since, default=None), self.revoked or other.revoked)

    def objection(self, signature: Signature) -> str:
        """Reason why a signature by this key is not taken; "" where it is."""
        name = f"the key {key_id(self.text)}"
        if self.revoked:
            return f"{name} was revoked"
        if self.until is not None and datetime.now(UTC).date() > self.until:
            return f"{name} is good until {self.until} only"
        if self.since is not None and signature.signed[:10] < self.since.isoformat():
            time = signature.signed or "at no stated time"
            return f"{name} signed it {time}, and signatures since {self.since} are taken"
        return ""


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
        raise invalid_signing_key(
            f"{file} can't be written: {(error.strerror or str(error)).lower()}",
            help="name a file that does not exist yet",
        ).rejection() from error
    return public


def sign_artifact(path: Path, secret_file: Path, note: str = "") -> Signature:
    """Add a signature to an artifact whose files are those of its manifest; one that the key gave before goes."""
    secret = _read_secret_key(secret_file)
    manifest = read_manifest(path)
    verify_files(path, manifest)
    key, time = text_of(secret.public_key().public_bytes_raw()), datetime.now(UTC).isoformat(timespec="seconds")
    provenance = provenance_statement(path, manifest)
    signature = Signature(key, secret.sign(statement(path, note, time, provenance)), note, time, provenance)
    remaining = [s for s in read_signatures(path) if s.key != signature.key]
    body = [{**vars(s), "signature": base64.b64encode(s.value).decode()} for s in (*remaining, signature)]
    for entry in body:
        del entry["value"]
    content = dump({"format": FORMAT, "signatures": body})
    if len(note) > _MAX_NOTE:
        raise unsigned(
            f"the note has {len(note)} characters, and at most {_MAX_NOTE} are kept with a signature"
        ).rejection()
    if len(body) > _MAX_SIGNATURES or len(content) > _MAX_BYTES:
        raise unsigned(
            f"{path} holds as many signatures as can be read: {_MAX_SIGNATURES}, of {_MAX_BYTES} bytes together",
            help=f"remove {path / SIGNATURES}, or older entries of it",
        ).rejection()
    write_atomic(path / SIGNATURES, content)
    return signature


def find_valid_signer(path: Path, keys: Sequence[str]) -> str:
    """The first of the keys, or of those in files, that signed an artifact as it is now; Reject where none did.

    Says nothing of the other files: the manifest that was signed holds their hashes, and `verify_files` compares.
    """
    trusted, present, objections = read_trusted_keys(keys), read_signatures(path), []
    for key in trusted.values():
        for signature in present:
            if signature.key == key.text and is_valid_signature(signature, path):
                if not (objection := key.objection(signature)):
                    return key.text
                objections.append(objection)
    if objections:
        reason, help = f"{path} is signed, but {objections[0]}", "ask its author for a newer one"
    elif not present:
        reason, help = f"{path} is not signed", "sign it with `effc sign`, or use it without --require-signature"
    elif any(s.key in trusted for s in present):
        reason, help = f"{path} was signed, and has changed since", "fetch it again, or have it signed again"
    else:
        reason, help = f"{path} is signed by {', '.join(s.key for s in present)}, which is another key", ""
    raise unsigned(reason, help=help).rejection()


def is_valid_signature(signature: Signature, path: Path) -> bool:
    """Whether a signature is of the artifact as it is now."""
    _check_library()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(_public_key_bytes(signature.key))
        key.verify(signature.value, statement(path, signature.note, signature.signed, signature.provenance))
    except InvalidSignature:
        return False
    return True


def statement(path: Path, note: str = "", signed: str = "", provenance: Mapping[str, Any] | None = None) -> bytes:
    """Bytes that are signed; of format 1 without time and provenance."""
    lines = [f"effc artifact signature {FORMAT if signed else 1}"]
    lines += [f"{name} {file_sha256(path / name) if (path / name).is_file() else 'absent'}" for name in _SIGNED]
    if signed:
        lines += [f"signed {json.dumps(signed)}", f"provenance {hashlib.sha256(dump(provenance or {})).hexdigest()}"]
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
        if body["format"] not in (1, FORMAT) or len(body["signatures"]) > _MAX_SIGNATURES:
            raise ValueError(f"format {FORMAT} has at most {_MAX_SIGNATURES} signatures")
        return [_signature(**entry) for entry in body["signatures"]]
    except (OSError, *MALFORMED) as error:
        raise unsigned(f"{file} holds no signatures: {error}", help="fetch it again").rejection() from error


def _signature(key: Any, signature: Any, note: Any, signed: Any = "", provenance: Any = None) -> Signature:
    if not all(isinstance(value, str) for value in (key, signature, note, signed)):
        raise TypeError("a signature's fields are texts")
    if not isinstance(provenance or {}, dict) or not is_plain_text([signed, provenance]):
        raise TypeError("a provenance is an object without control characters")
    if provenance and not signed:
        raise ValueError("format 1 signs no provenance")
    if len(signed) > _MAX_TIME:
        raise ValueError(f"a time has at most {_MAX_TIME} characters")
    dump(provenance or {})  # ValueError: it has no spelling that could be signed
    value = base64.b64decode(signature, validate=True)
    return Signature(text_of(_public_key_bytes(key)), value, note, signed, provenance or {})


def read_trusted_keys(keys: Sequence[str]) -> dict[str, TrustedKey]:
    """Public keys by their text, from texts and from files that hold one a line; of a key, every line counts."""
    trusted: dict[str, TrustedKey] = {}
    for key in keys:
        for line in [key] if key.strip().startswith(_KIND) else _lines_of_key_file(key):
            try:
                one = _trusted_key(line)
            except ValueError as error:
                raise invalid_signing_key(
                    f"`{line[:80]}` is no public key: {error}",
                    help="it is one line, `ed25519:` and 44 characters; behind them may stand `until=2030-01-31`, "
                    "`since=2030-01-31` and `revoked`",
                ).rejection() from error
            trusted[one.text] = one.stricter(trusted.get(one.text, one))
    return trusted


def _lines_of_key_file(file: str) -> Iterator[str]:
    """Lines of a file of keys, without comments, which begin with `#`."""
    try:
        text = read_regular_file(Path(file), _MAX_BYTES).decode("ascii")
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or "it is no text").lower()
        raise invalid_signing_key(
            f"`{file}` is no public key, and no file that holds one: {reason}",
            help="give `ed25519:...`, or the FILE.pub that holds it",
        ).rejection() from error
    lines = [line for row in text.splitlines() if (line := row.partition("#")[0].strip())]
    if not lines:
        raise invalid_signing_key(f"`{file}` holds no public key", help="give the FILE.pub that holds one").rejection()
    yield from lines


def _trusted_key(line: str) -> TrustedKey:
    text, *conditions = line.split()
    days: dict[str, date] = {}
    for name, equals, day in (c.partition("=") for c in conditions if c != "revoked"):
        if not equals or name not in ("until", "since"):
            raise ValueError(f"`{name[:20]}` means nothing behind it")
        if name in days:
            raise ValueError(f"`{name}` stands behind it twice")
        days[name] = date.fromisoformat(day)
    key = text_of(_public_key_bytes(text))
    return TrustedKey(key, days.get("until"), days.get("since"), "revoked" in conditions)


def key_id(key: str) -> str:
    """Short name of a public key: 16 hex digits of its sha256."""
    return hashlib.sha256(_public_key_bytes(key)).hexdigest()[:16]


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
        raise invalid_signing_key(
            f"{file} can't be read: {(error.strerror or str(error)).lower()}",
            help="`effc sign --new-key FILE` makes a key",
        ).rejection() from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise invalid_signing_key(
            f"{file} is no secret key in PEM without a passphrase", help="`effc sign --new-key FILE` makes one"
        ).rejection() from error
    if not isinstance(key, Ed25519PrivateKey):
        raise invalid_signing_key(f"{file} is no Ed25519 key", help="`effc sign --new-key FILE` makes one").rejection()
    return key


def _check_library() -> None:
    check_modules(["cryptography"], "sign", "a signature")
