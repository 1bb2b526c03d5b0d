"""A sum of which the server sees nothing but the sum: clients add masks that cancel out in pairs.

Each pair of clients agrees on a secret (X25519) that the server, which only carries public keys, doesn't learn; from
it come new masks every round (HKDF, then the ChaCha20 key stream). Numbers are fixed point, 32 bits, and sums are
modulo 2^32, so that masks cancel exactly. A client that drops out leaves its masks in the others' messages: the round
is repeated without it, and a server that then gets its late answer can take the masks off: those of the others' first
and second answers differ by them. The server can't see single states: no median, no weights by content, no check for
NaN (the client makes that one), and a client that lies can't be told.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", without the second
mask and the shares that recover from drop-outs.
"""

from collections.abc import Mapping

import numpy as np

from ....dsl.syntax.diagnostics import Fault
from ...core.environment import check_modules
from .state import Shapes, State

BITS = 16  # after the point
LIMIT = 2.0 ** (31 - BITS)  # of a sum

mask_range = Fault("mask-range", "A number is too large for the fixed point of a masked sum.", exit="failure")


class Keys:
    """A client's pair of keys for one run; `public` is what the others need. `private` brings back those of before."""

    def __init__(self, private: bytes | None = None):
        check_modules(("cryptography",), "fed", "a masked sum")
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self._key = X25519PrivateKey.from_private_bytes(private) if private else X25519PrivateKey.generate()
        self.private: bytes = self._key.private_bytes_raw()
        self.public: bytes = self._key.public_key().public_bytes_raw()

    def check_public_key(self, public_key_hex: str) -> None:
        """Raises ValueError for what is no public key in hex, or one that has no secret with others."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        self._key.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public_key_hex)))

    def mask_for_client(
        self, client: int, public_keys: Mapping[int, bytes], round_number: int, count: int
    ) -> np.ndarray:
        """The sum of the masks of client `client` with each of the others in a round, uint32 [count]."""
        total = np.zeros(count, np.uint32)
        for other in sorted(public_keys.keys() - {client}):
            stream = self._pairwise_random_numbers(
                public_keys[other], round_number, min(client, other), max(client, other), count
            )
            total = total + stream if client < other else total - stream
        return total

    def _pairwise_random_numbers(
        self, public_key: bytes, round_number: int, low_client: int, high_client: int, count: int
    ) -> np.ndarray:
        """Shared random numbers of a pair in a round, uint32 [count]."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        secret = self._key.exchange(X25519PublicKey.from_public_bytes(public_key))
        info = f"effc masks, round {round_number}, clients {low_client} and {high_client}".encode()
        key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * count))
        return np.frombuffer(stream, "<u4").astype(np.uint32)


def to_fixed_point(state: State, n_clients: int) -> np.ndarray:
    """A state in fixed point, by name, uint32; Reject where the sum over the clients could pass its range."""
    from .state import flat_float64

    values = flat_float64(state)
    peak = float(np.abs(values).max(initial=0.0))
    if not peak * n_clients < LIMIT:
        raise mask_range(
            f"a state holds {peak:g}, and sums of {n_clients} such pass {LIMIT:g}",
            help="lower the learning rate, or send without masks",
        ).rejection()
    return np.rint(values * 2**BITS).astype(np.int64).astype(np.uint32)


def from_fixed_point(fixed_point_sum: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """The arrays of a sum in fixed point, float32."""
    values = fixed_point_sum.astype(np.uint32).astype(np.int32).astype(np.float64) / 2**BITS
    arrays, at = {}, 0
    for name in sorted(shapes):
        count = int(np.prod(shapes[name], dtype=np.int64))
        arrays[name] = values[at : at + count].reshape(shapes[name]).astype(np.float32)
        at += count
    return arrays


def mean_of_others(sum_of_all: State, local_state: State, n_clients: int) -> dict[str, np.ndarray]:
    """All-But-Me from the sum of all: (S - own) / (clients - 1), which every client works out by itself."""
    assert n_clients > 1, "nobody else is there"
    return {
        name: ((sum_of_all[name].astype(np.float64) - local_state[name]) / (n_clients - 1)).astype(
            local_state[name].dtype
        )
        for name in local_state
    }
