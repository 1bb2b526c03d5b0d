"""SmolLM2-135M decoding: the native engine's variants, torch, ONNX Runtime and llama.cpp, in turn.

    python -m bench.decode [--threads 2] [--seconds 4] [--only own,torch,onnx,llama] [--keep FOLDER] [--no-quality] [--json FILE]

All decode greedily from contexts of 64 to 128 tokens, and read prompts of 256 and 1,024. Each lives in a process of
its own, since ggml sets up AMX tiles once a thread and dies where anybody else has released them, and is asked for
a burst at a time, after a pause in which the threads of the one before come to rest; real-time priority where the
system allows it. A step in which a thread was pre-empted is thrown away. The memory bound is what a token must read
of weights, at the read bandwidth measured in the same race. llama.cpp takes part where `llama_cpp` imports (of
llama-cpp-python, built for this machine: wheels without AVX-512 are no fair opponent; its `LLAMA_CPP_LIB_PATH`
names a build), ik_llama.cpp where `IK_LLAMA_BENCH` names the library that ik_llama.cc makes, ONNX Runtime where it,
`onnx` and `onnxscript` import.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from effc.compiler.transforms.lowering.contenders import memory_read_contender
from effc.compiler.transforms.lowering.racing import involuntary_switches, try_set_real_time_priority

from bench.decoders import (
    IK,
    IK_LIBRARY,
    LLAMA,
    NATIVE_VARIANTS,
    ONNX,
    SHORT,
    available_contestants,
    open_contestant,
    perplexity,
    tokenizer,
    write_contestants,
)
from bench.json_table import add_json_option, write_table

ROOT = Path(__file__).parents[1]
PROMPTS = (256, 1024)  # tokens
REST = 0.02  # seconds
STEPS = 24  # tokens of a burst
READ, READ_BYTES = "read", 128 << 20


class Reading:
    """Reads as many bytes as a model has and does nothing with them: its step is the memory bound."""

    def __init__(self, threads: int):
        self.bytes, self.turn = READ_BYTES, 0
        self.calls = memory_read_contender(READ_BYTES, threads).calls

    def prompt(self, ids: list[int]) -> None: ...

    def step(self) -> None:
        self.turn += 1
        self.calls[self.turn % len(self.calls)]()


# The child: one contestant, who does what is asked for


def print_decode_seconds_per_stdin_line(folder: Path, name: str, threads: int) -> None:
    """Open the contestant, say what that took, then answer requests, a line of JSON each."""
    torch.set_num_threads(threads)
    rows = json.loads((folder / "rows.json").read_text())
    if name in LLAMA:
        import llama_cpp  # noqa: F401
    before, raised = peak(), try_set_real_time_priority(True)
    started = time.perf_counter()
    made = Reading(threads) if name == READ else open_contestant(folder, name, threads)
    loaded = time.perf_counter() - started
    made.prompt(rows[0][: PROMPTS[0]])
    first = time.perf_counter() - started - loaded
    if raised:
        try_set_real_time_priority(False)
    for _ in range(2):
        made.step()
    say(load_s=loaded, first_s=first, peak_bytes=peak() - before, bytes=made.bytes)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "perplexity":
            cut = [row[: PROMPTS[0]] for row in rows]
            say(perplexity=perplexity(made, cut))
        elif asked["do"] == "prompt":
            say(seconds=time_calls(lambda n=asked["count"]: made.prompt(rows[0][:n]), 1))
        else:
            made.prompt(rows[0][:SHORT])
            say(seconds=time_calls(made.step, asked["count"]))


def time_calls(call, count: int) -> list[list]:
    """Seconds of each call, and whether no thread was pre-empted in it."""
    raised = try_set_real_time_priority(True)
    found = []
    for _ in range(count):
        gone, start = involuntary_switches(), time.perf_counter()
        call()
        found.append([time.perf_counter() - start, involuntary_switches() == gone])
    if raised:
        try_set_real_time_priority(False)
    return found


def peak() -> int:
    """Bytes of the largest resident set of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


def say(**facts) -> None:
    print(json.dumps(facts), flush=True)


# The parent: who races


@dataclass
class Racer:
    """A contestant's process, and the seconds seen of it by what it did."""

    name: str
    process: subprocess.Popen
    facts: dict
    kept: dict[str, list[float]] = field(default_factory=dict)
    thrown: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, folder: Path, name: str, threads: int) -> "Racer":
        command = [
            sys.executable,
            "-m",
            "bench.decode",
            "--child",
            name,
            "--keep",
            str(folder),
            "--threads",
            str(threads),
        ]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return cls(name, process, answer(name, process))

    def ask(self, verb: str, count: int = 1) -> dict:
        self.process.stdin.write(json.dumps({"do": verb, "count": count}) + "\n")
        self.process.stdin.flush()
        return answer(self.name, self.process)

    def burst(self, action: str, count: int) -> float:
        key = action if action == "step" else f"{action} {count}"
        spent = 0.0
        for seconds, undisturbed in self.ask(action, count)["seconds"]:
            (self.kept if undisturbed else self.thrown).setdefault(key, []).append(seconds)
            spent += seconds
        return spent

    def seconds(self, key: str) -> float:
        """Median of the samples that count; of all, where the machine left none."""
        return statistics.median(self.kept.get(key) or self.thrown[key])

    def counted(self, key: str) -> str:
        kept = len(self.kept.get(key, []))
        return f"{kept}/{kept + len(self.thrown.get(key, []))}"

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def answer(name: str, process: subprocess.Popen) -> dict:
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"{name} ended with {process.wait()}")


def race_in_turns(contenders: list[Racer], action: str, count: int, seconds: float) -> None:
    """Bursts in turn, forwards and backwards, until the median racer had `seconds`."""
    spent = {racer.name: 0.0 for racer in contenders}
    turn = 0
    while turn < 4 or statistics.median(spent.values()) < seconds:
        for racer in contenders if turn % 2 else contenders[::-1]:
            time.sleep(REST)
            spent[racer.name] += racer.burst(action, count)
        turn += 1


def print_aligned_columns(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}")
    wide = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, wide, strict=True))
        )
        print("  ".join([first, *others]))


def run_benchmark(folder: Path, options: argparse.Namespace) -> None:
    names = available_contestants(options.only.split(","))
    write_contestants(folder, names)
    loads = {name: [load(folder, name, options.threads) for _ in range(2)] for name in names}
    racers = [Racer.start(folder, name, options.threads) for name in [READ, *names]]
    race_in_turns(racers, "step", STEPS, options.seconds)
    reading, *racers = racers
    for tokens in PROMPTS:
        race_in_turns(racers, "prompt", tokens, options.seconds)
    rate = READ_BYTES / reading.seconds("step")
    print(f"{options.threads} threads, read bandwidth {rate / 1e9:.1f} GB/s; medians of samples without pre-emption")
    fills = [f"prompt {tokens}" for tokens in PROMPTS]
    lines = []
    for r in racers:
        step = r.seconds("step")
        speeds = [f"{tokens / r.seconds(key):.0f}" for tokens, key in zip(PROMPTS, fills, strict=True)]
        counts = ", ".join(r.counted(key) for key in ("step", *fills))
        bound = r.facts["bytes"] / rate / step
        lines.append([r.name, f"{1 / step:.1f}", f"{1e3 * step:.2f}", f"{bound:.2f}", *speeds, counts])
    head = ["", "tokens/s", "ms", "of bound", *(f"prefill {tokens} t/s" for tokens in PROMPTS), "samples"]
    print_aligned_columns("SmolLM2-135M-Instruct", head, lines)
    print_goals(racers)
    quality = {}
    if not options.no_quality:
        quality = {r.name: f"{r.ask('perplexity')['perplexity']:.2f}" for r in racers}
        title = "perplexity, 4 rows of 256 tokens of the zoo's held-out text"
        print_aligned_columns(title, ["", "perplexity"], [list(row) for row in quality.items()])
    for racer in [reading, *racers]:
        loads.setdefault(racer.name, []).append(racer.facts)
        racer.close()
    memory = []
    for name in names:
        low = {key: statistics.median(facts[key] for facts in loads[name]) for key in loads[name][0]}
        memory.append([name, f"{low['load_s']:.2f}", f"{1e3 * low['first_s']:.0f}", f"{low['peak_bytes'] / 2**20:.0f}"])
    head = ["", "load s", "first token ms", "peak MiB"]
    print_aligned_columns("each in its process, median of 3, above what the process had before", head, memory)
    peaks = {name: peak for name, *_, peak in memory}
    columns = [
        "",
        "tokens/s",
        "of the memory bound",
        *(f"prefill {n}, tokens/s" for n in PROMPTS),
        "perplexity",
        "peak MiB",
    ]
    rows = [
        [name, f"{float(speed):.0f}", bound, *prompts, quality.get(name, ""), peaks[name]]
        for name, speed, _, bound, *prompts, _ in lines
    ]
    write_table(options.json, columns, rows)


def load(folder: Path, name: str, threads: int) -> dict:
    racer = Racer.start(folder, name, threads)
    racer.close()
    return racer.facts


def print_goals(contenders: list[Racer]) -> None:
    by = {r.name: r for r in contenders}
    pairs = [("native 50% sparse int8", "llama.cpp q8_0", 1.5), ("native bf16", "llama.cpp bf16", 1.3)]
    pairs += [(ours, f"ik_{theirs}", goal) for ours, theirs, goal in pairs]
    for ours, theirs, goal in pairs:
        if ours in by and theirs in by:
            ratio = by[theirs].seconds("step") / by[ours].seconds("step")
            print(f"{ours} against {theirs}: {ratio:.2f}x (goal {goal}x)")
    mine = [r for r in contenders if r.name in NATIVE_VARIANTS]
    for tokens in PROMPTS if mine else ():
        for family, names in (("llama.cpp", LLAMA), ("ik_llama.cpp", IK)):
            theirs = [r for r in contenders if r.name in names]
            if theirs:
                best, other = (min(r.seconds(f"prompt {tokens}") for r in side) for side in (mine, theirs))
                print(f"a prompt of {tokens} against the best of {family}: {other / best:.2f}x (goal 1.2x)")
    for module, name in ((ONNX[-1], "ONNX Runtime"), ("llama_cpp", "llama.cpp")):
        if not find_spec(module):
            print(f"{name}: absent, `{module}` does not import")
    if not IK_LIBRARY:
        print("ik_llama.cpp: absent, `IK_LLAMA_BENCH` names no library (see ik_llama.cc)")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--only", default="own,torch,onnx,llama")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--no-quality", action="store_true")
    add_json_option(parser)
    asked = parser.parse_args()
    if asked.child:
        print_decode_seconds_per_stdin_line(asked.keep, asked.child, asked.threads)
        return
    with contextlib.ExitStack() as stack:
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        if not (folder / "rows.json").exists():
            ids = tokenizer()((ROOT / "recipes/zoo/tiny-llama/heldout.txt").read_text()[:30000])["input_ids"]
            rows = [ids[i : i + PROMPTS[-1]] for i in range(0, 4 * PROMPTS[-1], PROMPTS[-1])]
            (folder / "rows.json").write_text(json.dumps(rows))
        run_benchmark(folder, asked)


if __name__ == "__main__":
    main()
