"""Print tokens a second of the native engine by its number of threads, more than the machine has included.

    python -m bench.threads FOLDER [--threads 1 2 3 4] [--rounds 16]

FOLDER is what the target `native` writes. Each number has a process of its own; they take turns of 24 tokens, greedily
from contexts of 64 to 128. Run it under `taskset -c 0` for a container of one core.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS, REST = 24, 0.03  # tokens of a turn; seconds before it: threads of the one before spin for some milliseconds


def print_decode_seconds_per_stdin_line(folder: Path, threads: int) -> None:
    """Answer every line of stdin with seconds a token."""
    from bench.decoders import Own

    made = Own(folder, threads)
    made.prompt(list(range(64)))
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(STEPS):
            made.step()
        print((time.perf_counter() - started) / STEPS, flush=True)


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return print_decode_seconds_per_stdin_line(options.folder, options.threads[0])
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    command = [sys.executable, "-m", "bench.threads", str(options.folder), "--serve", "--threads"]
    players = {n: subprocess.Popen([*command, str(n)], stdin=-1, stdout=-1, text=True) for n in options.threads}
    seconds: dict[int, list[float]] = {n: [] for n in players}
    for player in players.values():
        assert player.stdout.readline() == "ready\n", "one did not begin"
    for number in range(options.rounds + 1):
        for threads, player in players.items():
            time.sleep(REST)
            player.stdin.write("go\n")
            player.stdin.flush()
            found = float(player.stdout.readline())
            if number:  # the first turn warms up
                seconds[threads].append(found)
    for threads, player in players.items():
        player.stdin.close()
        player.wait()
        print(f"{threads} threads: {1 / statistics.median(seconds[threads]):.0f} tokens/s")


if __name__ == "__main__":
    main()
