"""Keys of signatures: pairs on disk, public keys as text, and the conditions on which a public key counts.

A public key is one line: `p256:` (or `p384:`, `p521:`) and the compressed point in base64, or `ed25519:` and 32 bytes.
The file FILE.pub of a pair holds the line of an Ed25519 key, and a PEM of the others, as OpenSSL writes it.
"""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from ...dsl.syntax.diagnostics import Fault
from ..core.environment import check_modules
from ..core.json_errors import reject_on_error
from ..core.safe_read import CONFIG, read_regular_file

ED25519 = "ed25519"
CURVES = {"p256": ("SECP256R1", "SHA256"), "p384": ("SECP384R1", "SHA384"), "p521": ("SECP521R1", "SHA512")}
KEY_TYPES = (*CURVES, ED25519)
_KEY_BYTES = {"p256": 33, "p384": 49, "p521": 67, ED25519: 32}
_PREFIXES = tuple(f"{name}:" for name in KEY_TYPES)
_MAX_BYTES = 1 << 20  # of a file of public keys
_SECRET_PEM = re.compile(r"-----BEGIN ([A-Z]+ )*PRIVATE KEY-----")
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----[^-]{1,2000}-----END PUBLIC KEY-----")

invalid_signing_key = Fault(
    "bad-signing-key",
    "A key for signatures can't be read, or is of another kind.\n\n"
    "`effc sign --new-key FILE` makes a pair: FILE is secret and signs, FILE.pub is given to those who check. Keys are "
    "of P-256, P-384 and P-521, and of Ed25519.",
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
class TrustedKey:
    """A public key and what of its signatures is taken: a line `p256:... until=DAY since=DAY revoked` of a file.

    until     after that day, nothing
    since     what was signed on that day or later, so that no older version passes for a newer one
    revoked   nothing
    """

    text: str
    until: date | None = None
    since: date | None = None
    revoked: bool = False

    def with_stricter_conditions(self, other: "TrustedKey") -> "TrustedKey":
        """The key with the conditions of two lines, both of which count."""
        until, since = ([d for d in pair if d] for pair in ((self.until, other.until), (self.since, other.since)))
        return TrustedKey(self.text, min(until, default=None), max(since, default=None), self.revoked or other.revoked)

    def rejection_reason(self, signed_at: str) -> str:
        """Reason why a signature of that time, in ISO 8601, is not taken; "" where it is."""
        name = f"the key {key_id(self.text)}"
        if self.revoked:
            return f"{name} was revoked"
        if self.until is not None and datetime.now(UTC).date() > self.until:
            return f"{name} is good until {self.until} only"
        if self.since is not None and signed_at[:10] < self.since.isoformat():
            time = signed_at or "at no stated time"
            return f"{name} signed it {time}, and signatures since {self.since} are taken"
        return ""


def write_key_pair(file: Path, key_type: str = "p256") -> str:
    """Write a secret key that its owner alone can read, and beside it the public one, which is returned as text."""
    check_signing_library()
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    secret: Any
    if key_type == ED25519:
        secret = Ed25519PrivateKey.generate()
    else:
        secret = ec.generate_private_key(getattr(ec, CURVES[key_type][0])())
    public = public_key_text(secret.public_key())
    published = f"{public}\n" if key_type == ED25519 else public_pem(secret.public_key()).decode()
    with reject_on_error(
        invalid_signing_key, f"{file} can't be written", "name a file that does not exist yet", error_types=OSError
    ):
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        file.with_name(f"{file.name}.pub").write_text(published, encoding="ascii")
    return public


def read_secret_key(file: Path) -> Any:
    """The secret key of a PEM file, as `cryptography` has it. Raises Reject for one that signs nothing here."""
    check_signing_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    help = "`effc sign --new-key FILE` makes one"
    try:
        content = read_regular_file(file, CONFIG)
        key = load_pem_private_key(content, password=None)
    except OSError as error:
        raise invalid_signing_key(
            f"{file} can't be read: {(error.strerror or str(error)).lower()}", help=help
        ).rejection() from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        kind = " but a public one" if _PEM.search(content.decode("ascii", "replace")) else ""
        raise invalid_signing_key(
            f"{file} is no secret key in PEM without a passphrase{kind}", help=help
        ).rejection() from error
    with reject_on_error(invalid_signing_key, f"{file}", help, error_types=ValueError):
        public_key_text(key.public_key())
    return key


def read_trusted_keys(keys: Sequence[str]) -> dict[str, TrustedKey]:
    """Public keys by their text, from texts and from files that hold one a line; of a key, every line counts."""
    trusted: dict[str, TrustedKey] = {}
    for key in keys:
        for line in [key] if key.strip().startswith(_PREFIXES) else _lines_of_key_file(key):
            try:
                one = _parse_trusted_key(line)
            except ValueError as error:
                raise invalid_signing_key(
                    f"`{line[:80]}` is no public key: {error}",
                    help="it is one line, `p256:` or `ed25519:` and 44 characters, or a PEM in a file; behind them may "
                    "stand `until=2030-01-31`, `since=2030-01-31` and `revoked`",
                ).rejection() from error
            trusted[one.text] = one.with_stricter_conditions(trusted.get(one.text, one))
    return trusted


def _lines_of_key_file(file: str) -> Iterator[str]:
    """Lines of a file of keys, without comments, which begin with `#`; a PEM counts as the line of its key."""
    help = "give `p256:...`, or the FILE.pub that holds it"
    with reject_on_error(invalid_signing_key, f"`{file}` is no public key, and no file that holds one", help):
        text = read_regular_file(Path(file), _MAX_BYTES).decode("ascii")
    if _SECRET_PEM.search(text):
        raise invalid_signing_key(
            f"`{file}` holds a secret key, and signatures are checked by the public one",
            help="give the FILE.pub beside it; whoever has the secret key can sign in its owner's name",
        ).rejection()
    text = _PEM.sub(lambda match: _public_key_text_of_pem(match[0], file), text)
    lines = [line for row in text.splitlines() if (line := row.partition("#")[0].strip())]
    if not lines:
        raise invalid_signing_key(f"`{file}` holds no public key", help="give the FILE.pub that holds one").rejection()
    yield from lines


def _public_key_text_of_pem(pem: str, file: str) -> str:
    check_signing_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return public_key_text(load_pem_public_key(pem.encode()))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise invalid_signing_key(
            f"`{file}` holds a PEM that is no public key of P-256, P-384, P-521 or Ed25519",
            help="give the FILE.pub that `effc sign --new-key FILE` wrote",
        ).rejection() from error


def _parse_trusted_key(line: str) -> TrustedKey:
    text, *conditions = line.split()
    days: dict[str, date] = {}
    for name, equals, day in (c.partition("=") for c in conditions if c != "revoked"):
        if not equals or name not in ("until", "since"):
            raise ValueError(f"`{name[:20]}` means nothing behind it")
        if name in days:
            raise ValueError(f"`{name}` stands behind it twice")
        days[name] = _parse_iso_day(day)
    return TrustedKey(canonical_key_text(text), days.get("until"), days.get("since"), "revoked" in conditions)


def _parse_iso_day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"`{text[:20]}` is no day such as 2030-01-31") from error


def public_key_text(key: Any) -> str:
    """A public key of `cryptography` as one line. Raises ValueError for a key of another kind."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    if isinstance(key, Ed25519PublicKey):
        return f"{ED25519}:{base64.b64encode(key.public_bytes_raw()).decode()}"
    curves = {curve.lower(): name for name, (curve, _) in CURVES.items()}
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in curves:
        raise ValueError("its key is none of P-256, P-384, P-521 and Ed25519")
    point = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    return f"{curves[key.curve.name]}:{base64.b64encode(point).decode()}"


def public_key_of_text(text: str) -> Any:
    """A public key as `cryptography` has it. Raises ValueError for a text that is none."""
    check_signing_library()
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    name, raw = _parse_type_and_bytes(text)
    if name == ED25519:
        return Ed25519PublicKey.from_public_bytes(raw)
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(getattr(ec, CURVES[name][0])(), raw)
    except ValueError as error:
        raise ValueError("its bytes are no point of the curve") from error


def canonical_key_text(text: str) -> str:
    """The one spelling of a public key. Raises ValueError for a text that is none."""
    name, raw = _parse_type_and_bytes(text)
    if name != ED25519:
        public_key_of_text(text)
    return f"{name}:{base64.b64encode(raw).decode()}"


def _parse_type_and_bytes(text: str) -> tuple[str, bytes]:
    name, _, encoded = text.partition(":")
    if name not in KEY_TYPES:
        raise ValueError(f"it does not start with {', '.join(_PREFIXES[:-1])} or {_PREFIXES[-1]}")
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("it is no base64") from error
    if len(raw) != _KEY_BYTES[name]:
        raise ValueError(f"it has {len(raw)} bytes, and {name}'s have {_KEY_BYTES[name]}")
    return name, raw


def public_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def key_digest(text: str) -> str:
    """SHA-256 of a public key: of an Ed25519 key's bytes, and of the others' PEM, which `model.sig` has as hint."""
    name, raw = _parse_type_and_bytes(text)
    return hashlib.sha256(raw if name == ED25519 else public_pem(public_key_of_text(text))).hexdigest()


def key_id(text: str) -> str:
    """Short name of a public key: the first 16 hex digits of its digest."""
    return key_digest(text)[:16]


def check_signing_library() -> None:
    check_modules(["cryptography"], "sign", "a signature")
