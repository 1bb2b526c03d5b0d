"""`python -m tests.fuzz TARGET --seconds 60 --seed 0`: give a reader changed inputs until time is up.

What breaks it is kept as `tests/fuzz/found/TARGET-HASH`, which every run of the tests reads from then on;
`--again FILE` reads one. `python -m tests.fuzz --sanitized --seconds 60` builds the kernels under AddressSanitizer and
UBSan (the portable level alone, once, in `build/sanitized`: two minutes) and runs the targets that reach C++ over them,
each in a process of its own.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.changes import changed
from tests.fuzz.targets import REFUSALS, TARGETS
from tests.hostile import kinds
from tests.sanitized import PORTABLE, ROOT, built, environment

NATIVE = ("packed", "plan", "int4", "mixture")  # which reach C++
DIED = 99  # what a sanitizer ends its process with
FOUND = Path(__file__).with_name("found")
SLOW = 5.0  # seconds of processor time for one input


def main() -> int:
    asked = argparse.ArgumentParser(prog="python -m tests.fuzz")
    asked.add_argument("target", choices=TARGETS, nargs="?")
    asked.add_argument("--seconds", type=float, default=60)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--again", type=Path)
    asked.add_argument("--last", type=Path, help="a file that has the input that is being read")
    asked.add_argument("--sanitized", action="store_true")
    given = asked.parse_args()
    if given.sanitized:
        return sanitized([given.target] if given.target else NATIVE, given.seconds, given.seed)
    if given.target is None:
        asked.error("which reader?")
    target = TARGETS[given.target]
    with tempfile.TemporaryDirectory() as scratch:
        seeds, folder = target.seeds(kinds.honest(Path(scratch, "honest"))), Path(scratch, "own")
        folder.mkdir()
        if given.again:
            return _broken(target, given.again.read_bytes(), folder)
        until, draw, count, found = time.monotonic() + given.seconds, random.Random(given.seed), 0, set()
        for seed in seeds:
            target.read(seed, folder)
        while time.monotonic() < until:
            data, count = changed(seeds, draw), count + 1
            if given.last:
                given.last.write_bytes(data)
            if why := broken(target, data, folder):
                if why not in found:
                    kept = FOUND / f"{given.target}-{hashlib.sha256(data).hexdigest()[:12]}"
                    kept.write_bytes(data)
                    sys.stdout.write(f"{kept}: {why}\n")
                found.add(why)
        sys.stdout.write(f"{given.target}: {count} inputs, {len(found)} ways to break it\n")
        return bool(found)


def sanitized(targets: Sequence[str], seconds: float, seed: int, build: Path = ROOT / "build" / "sanitized") -> int:
    """Each target in a process whose kernels are watched; the input at which one died is kept as found."""
    env, found = environment(built(build, PORTABLE)), 0
    env["ASAN_OPTIONS"], env["UBSAN_OPTIONS"] = f"detect_leaks=0:exitcode={DIED}", f"halt_on_error=1:exitcode={DIED}"
    with tempfile.TemporaryDirectory() as scratch:
        last = Path(scratch, "last")
        for name in targets:
            words = [name, "--seconds", str(seconds), "--seed", str(seed), "--last", str(last)]
            done = subprocess.run([sys.executable, "-m", "tests.fuzz", *words], env=env, cwd=ROOT)
            if done.returncode not in (0, 1) and last.exists():
                data = last.read_bytes()
                kept = FOUND / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
                kept.write_bytes(data)
                sys.stdout.write(f"{kept}: the process ended with {done.returncode}\n")
            found += done.returncode != 0
    return bool(found)


def broken(target, data: bytes, folder: Path) -> str:
    """Why a reader broke, "" where it took the input or refused it."""
    started = time.process_time()
    try:
        target.read(data, folder)
    except REFUSALS:
        pass
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:100]}"
    took = time.process_time() - started
    return "" if took < SLOW else "it took too long"


def _broken(target, data: bytes, folder: Path) -> int:
    why = broken(target, data, folder)
    sys.stdout.write(f"{why or 'it was read, or refused'}\n")
    return bool(why)


if __name__ == "__main__":
    sys.exit(main())
