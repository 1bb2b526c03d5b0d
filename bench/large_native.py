"""How soon a native artifact opens, and how near to the memory's speed it decodes: for those of many gigabytes.

    python -m bench.large_native ARTIFACT [--threads 2] [--rounds 8] [--openings 3]

Each opening has a process of its own, warm from the one before, and checks every weight: seconds of the opening, and of
the process from its start. Then decoding and reading as many bytes (a vector of them, again and again) take turns of
four tokens; the bound is what a token must read, at the speed of the readings beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from effc.compiler.core.fingerprint import machine_facts

STEPS, READ_BYTES = 4, 512 << 20
MODES = {"by default": None, "mapped": True, "copied": False}


def open_model(folder: Path, threads: int, mode: str) -> tuple[Any, float]:
    """A model that decodes (`decoders.Own`'s way), and the seconds that it took to open."""
    import torch
    from effc.compiler.runtimes.native.opening import open_native

    torch.set_num_threads(threads)
    started = time.perf_counter()
    model = open_native(folder, threads=threads, mapped=MODES[mode], max_sequences=1)
    return model, time.perf_counter() - started


def measure_decoding(folder: Path, threads: int, rounds: int, mode: str) -> dict:
    """Seconds a token and GB/s of reading, round by round."""
    from effc.compiler.transforms.lowering.contenders import memory_read_contender

    from bench.decoders import bytes_read

    model, seconds = open_model(folder, threads, mode)
    reading, read = memory_read_contender(READ_BYTES, threads), bytes_read(folder)
    token = int(model.engine.run(list(range(16)), [0] * 16, [15]).argmax())
    token_seconds, speeds = [], []
    for number in range(rounds + 1):
        started = time.perf_counter()
        for _ in range(STEPS):
            token = int(model.engine.run([token], [0], [0]).argmax())
        middle = time.perf_counter()
        turns = max(1, STEPS * read // READ_BYTES // 4)
        for turn in range(turns):
            reading.calls[turn % len(reading.calls)]()
        if number:  # the first warms up
            token_seconds.append((middle - started) / STEPS)
            speeds.append(turns * READ_BYTES / (time.perf_counter() - middle))
    return {"open": seconds, "bytes": read, "token": token_seconds, "speed": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--openings", type=int, default=3)
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.artifact / "native" if (options.artifact / "native").is_dir() else options.artifact
    if options.child and options.decode:
        return print(json.dumps(measure_decoding(folder, options.threads, options.rounds, options.child)))
    if options.child:
        _, seconds = open_model(folder, options.threads, options.child)
        return print(json.dumps(seconds))
    size = (folder / "weights.bin").stat().st_size
    print(
        ", ".join(f"{k} {v}" for k, v in machine_facts().items()), f"weights {size / 1e9:.2f} GB", sep="\n", flush=True
    )
    for mode in MODES:
        command = [
            sys.executable,
            "-m",
            "bench.large_native",
            str(folder),
            "--threads",
            str(options.threads),
            "--child",
            mode,
        ]
        openings, whole = [], []
        for _ in range(options.openings):
            started = time.perf_counter()
            openings.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            whole.append(time.perf_counter() - started)
        again = [*command, "--decode", "--rounds", str(options.rounds)]
        done = json.loads(subprocess.run(again, capture_output=True, text=True, check=True).stdout)
        token, speed = statistics.median(done["token"]), statistics.median(done["speed"])
        share = statistics.median(
            done["bytes"] / fast / one for one, fast in zip(done["token"], done["speed"], strict=True)
        )
        print(
            f"{mode:<10} opens in {' '.join(f'{s:.1f}' for s in openings)} s, the process in "
            f"{' '.join(f'{s:.1f}' for s in whole)} s; {1 / token:.2f} tokens/s, {share:.2f} of the memory bound "
            f"(reading at {speed / 1e9:.1f} GB/s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
