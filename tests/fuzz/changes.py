"""Bytes changed at random: bits, cuts, copies, numbers at the edges; of JSON also whole values."""

import json
import random

from tests.hostile.mutations import ODD, places

EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
NEAR = 2048  # bytes of a start, where headers are


def changed(seeds: list[bytes], draw: random.Random) -> bytes:
    """One of the seeds with one to four changes."""
    data = draw.choice(seeds)
    for _ in range(draw.randint(1, 4)):
        data = _json(data, draw) if draw.random() < 0.5 else _bytes(bytearray(data), draw)
    return data


def _json(data: bytes, draw: random.Random) -> bytes:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(bytearray(data), draw)
    found = list(places(body))
    if not found:
        return data
    *path, last = draw.choice(found)
    owner = body
    for key in path:
        owner = owner[key]
    if draw.random() < 0.2:
        del owner[last]
    else:
        owner[last] = draw.choice(ODD)
    return json.dumps(body).encode()


def _bytes(data: bytearray, draw: random.Random) -> bytes:
    if not data:
        return bytes(draw.randrange(256) for _ in range(draw.randint(0, 32)))
    at = draw.randrange(min(len(data), NEAR) if draw.random() < 0.7 else len(data))
    what = draw.random()
    if what < 0.4:
        data[at] ^= 1 << draw.randrange(8)
    elif what < 0.6:
        width = draw.choice((1, 2, 4, 8))
        data[at : at + width] = (draw.choice(EDGES) % (1 << 8 * width)).to_bytes(width, "little")
    elif what < 0.7:
        del data[at : at + draw.choice((1, 8, 64, 4096))]
    elif what < 0.8:
        data[at:at] = data[at : at + draw.choice((1, 8, 64, 1024))] * draw.randint(1, 3)
    elif what < 0.9:
        data = data[:at]
    else:
        data[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 16)))
    return bytes(data)
