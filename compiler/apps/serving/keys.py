"""Keys that let a client in."""

import hmac
from collections.abc import Iterable
from hashlib import sha256

from ....dsl.syntax.diagnostics import Fault

bad_key = Fault(
    "bad-api-key",
    "A key for a server can't be one.\n\n"
    "A key is at least 16 characters without spaces, such as `openssl rand -hex 24` prints. Give each "
    "client its own: --api-key may be repeated, EFFC_API_KEY holds several with commas between.",
    exit="usage",
)

_SHORTEST = 16


class Keys:
    """Keys by number; only their hashes are kept. No keys let everybody in."""

    def __init__(self, keys: Iterable[str] = ()):
        keys = list(dict.fromkeys(keys))
        for number, key in enumerate(keys):
            if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise bad_key(
                    f"key {number} is no key: it has {len(key)} characters, and needs {_SHORTEST} "
                    "that are printable ASCII and no space",
                    help="`openssl rand -hex 24` makes one",
                ).rejection()
        self._hashes = [sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def key_index(self, authorization: str) -> int | None:
        """Whose key an `Authorization` header holds. All keys are looked at, whichever it is."""
        scheme, _, key = authorization.partition(" ")
        presented = sha256(key.strip().encode()).digest()
        equal = [hmac.compare_digest(presented, key_hash) for key_hash in self._hashes]
        return equal.index(True) if any(equal) and scheme.lower() == "bearer" else None
