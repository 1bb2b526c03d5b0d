"""Artifacts that were changed by somebody who then wrote the hashes anew."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**62,
    2**70,
    10**400,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../../etc/passwd",
    "/dev/zero",
    "os:system",
    "__import__",
    "from_pretrained",
    "self_attn.config.to_json_file",
    "org/kernel",
    "evil.Evil",
    "torch.load",
    "a" * 5000,
    "{{ ''.__class__ }}",
    "\udcff",
    "\x1b]0;title\x07\x9b31m\u202e",
    "a\nok: b\\",
    [],
    {},
    [[]],
    {"": ""},
    [0] * 1000,
    {"auto_map": {"AutoModel": "evil.E"}},
    {"node": "x"},
    {"use_pickle": True},
    "torch.ops.aten.from_file.default",
    "compiler.store.cache:Cache",
    "0" * 64,
)


def places(value: Any, path: tuple = ()):
    """Every place of a JSON tree but its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


def mutate(folder: Path, draw: random.Random) -> None:
    """Change one to three things of an artifact, and make its manifest fit."""
    for _ in range(draw.randint(1, 3)):
        files = sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
        file = draw.choice([f for f in files if f.suffix == ".json"] if draw.random() < 0.75 else files)
        if file.suffix == ".json" and draw.random() < 0.9:
            _change_json(file, draw)
        else:
            _change_bytes(file, draw)
    consistent(folder)


def _change_json(file: Path, draw: random.Random) -> None:
    try:
        body = json.loads(file.read_text())
    except ValueError:
        return
    found = list(places(body))
    if not found:
        return
    *path, last = draw.choice(found)
    owner = body
    for key in path:
        owner = owner[key]
    what = draw.random()
    if what < 0.15:
        del owner[last]
    elif what < 0.3:
        other = body
        for key in draw.choice(found):
            other = other[key]
        owner[last] = json.loads(json.dumps(other))
    elif what < 0.4 and isinstance(owner, dict):
        owner[draw.choice([o for o in ODD if isinstance(o, str)])] = owner.pop(last)
    else:
        owner[last] = draw.choice(ODD)
    file.write_text(json.dumps(body, ensure_ascii=True))


def _change_bytes(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    what = draw.random()
    if what < 0.2:
        data = data[: draw.randrange(len(data))]
    elif what < 0.3:
        data += bytes(draw.randrange(256) for _ in range(draw.randint(1, 64)))
    else:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(min(len(data), 4096) if draw.random() < 0.5 else len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def consistent(folder: Path) -> None:
    """Write the hashes of the files into the manifest, where it still is one."""
    path = folder / "manifest.json"
    try:
        body = json.loads(path.read_text())
        for name in list(body["files"]):
            if not (folder / name).is_file():  # a name may have become that of an endless device
                continue
            data = (folder / name).read_bytes()
            body["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    path.write_text(json.dumps(body))
