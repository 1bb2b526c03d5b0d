"""Print how long the engine's steps would take on more cores than this machine has, by a model that is checked here.

    python -m bench.many_cores [--context 512] [--rounds 5] [--only int8,bf16,int4] [--json FILE]

Needs a C++ compiler (`c++`): schedule, shares and barrier are those of kernels/src (schedules.py). A step is one token
behind `--context` tokens, or a prompt of 512 tokens of which the last one's logits are wanted.

The model: in each level of the schedule every thread has some work, as turn.cc, attention.cc and share.h divide it; a
level takes as long as the thread that has most, and no less than its weights' bytes at the speed of the sockets' memory
(here it gives two threads twice what it gives one);
behind each level all threads meet. A unit of each kind of work (bytes multiplied, tokens attended, numbers of a row that
a norm or a sum takes) costs what it costs one thread of this machine. What every thread does for itself and what lies
outside of the schedule is not divided. A meeting costs what two threads need here and, for each further thread, the time in
which a line of memory goes from one core to the other here, as if all came at once and one after another; `FAR` times as
much for those of another socket. Clocks, the last cache and tiles are taken to be as here however many cores work.

`measured` beside `predicted` for one and two threads here, costs taken from the other shape with one thread: the error
of the model as far as two cores show it. Of more cores nothing was measured.
"""

import argparse
import ctypes
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.transforms.lowering.contenders import memory_read_contender
from effc.compiler.transforms.lowering.racing import involuntary_switches, try_set_real_time_priority
from effc.kernels.engine import Engine
from effc.kernels.packed import allocate_zero_bytes

from bench.engine import LLAMA_1B, SMOLLM2_135M, Shape, Sizes, decode_step, prefill, run_burst
from bench.schedules import Call, Schedules, Work, library

SHAPES = {"SmolLM2-135M": SMOLLM2_135M, "Llama 3.2 1B": LLAMA_1B}
KERNELS = {"int8": "dense_linear_int8", "bf16": "dense_linear", "int4": "dense_linear_int4"}
PROMPT = 512  # tokens
READ_BYTES, BURST = 512 << 20, 0.4  # seconds

# Eight channels of DDR5-4800 (307 GB/s), the fourth generation of Xeons; four fifths of them are read on two sockets of
# Cascade Lake, 226 of 282 GB/s, where memory of the other socket takes 141 ns instead of 81 (Intel's Memory Latency
# Checker, github.com/gjbex/Code-optimization, info/cascadelake_mlc.txt). Between sockets three links of 35.8 GB/s each
# way, as that generation has (github.com/intel/pcm/issues/550).
SOCKET, BETWEEN, FAR = 0.8 * 307e9, 3 * 35.8e9, 141 / 81


@dataclass(frozen=True)
class Machine:
    """Threads on sockets, evenly; bytes a second that a socket's memory gives, and in which of them weights lie: each in
    that of the thread that reads it, page by page in turn (`numactl --interleave=all`), or all in one."""

    threads: int
    sockets: int = 1
    read: float = SOCKET
    weights: str = "by reader"

    @property
    def title(self) -> str:
        where = f", weights {self.weights}" if self.sockets > 1 else ""
        cores, sockets = ("s" if n > 1 else "" for n in (self.threads, self.sockets))
        return f"{self.threads} core{cores}, {self.sockets} socket{sockets}{where}"

    def reading(self, bytes: float) -> float:
        """Seconds in which that many bytes of weights are read, each by one thread: as fast as memories give them, and
        as those from other sockets get there, by one direction between sockets or more."""
        far = 0.0 if self.weights == "by reader" else 1 - 1 / self.sockets
        memories, ways = (1, 1) if self.weights == "in one" else (self.sockets, self.sockets)
        return max(bytes / (memories * self.read), far * bytes / (ways * BETWEEN))

    def meeting(self, pair: float, line: float) -> float:
        """Seconds of a barrier, from those of two threads and of a line's way between them."""
        near = self.threads // self.sockets
        return 0.0 if self.threads == 1 else pair + line * (near - 2 + FAR * (self.threads - near))


MACHINES = (
    *(Machine(n) for n in (1, 2, 8, 16, 32, 64)),
    *(Machine(64, 2, weights=where) for where in ("by reader", "interleaved", "in one")),
)


def predict(work: list[Work], costs: dict[str, float], machine: Machine, meeting: tuple) -> dict[str, float]:
    """Seconds of a step, and of what they consist."""
    by_level: dict[int, list[Work]] = defaultdict(list)
    for task in work:
        by_level[task.level].append(task)
    total = uneven = reading = 0.0
    for tasks in by_level.values():
        sums = [sum(costs[task.kind] * task.units[thread] for task in tasks) for thread in range(machine.threads)]
        level = max(max(sums), machine.reading(sum(task.bytes for task in tasks)))
        total += level
        uneven += max(0.0, max(sums) - sum(sums) / machine.threads)  # of equal ones the mean may round up
        reading += level - max(sums)
    own = sum(costs[task.kind] * min(task.units) for task in work if task.kind.startswith(("rows", "prepare")))
    barriers = len(by_level) * machine.meeting(*meeting)
    return {
        "seconds": total + barriers + costs["outside"],
        "barriers": barriers,
        "uneven": uneven,
        "memory": reading,
        "undivided": own + costs["outside"],
    }


def in_one_block(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a loaded artifact has them: on huge pages, one behind the other."""
    ends = [0, *accumulate(-(-w.nbytes // 64) * 64 for w in weights.values())]
    block = allocate_zero_bytes(ends[-1])
    result = {}
    for (name, weight), start in zip(weights.items(), ends, strict=False):
        result[name] = block[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        result[name].copy_(weight)
    return result


@dataclass(frozen=True)
class Sample:
    seconds: float
    spent: dict[str, float]  # of it, by kind of work
    undisturbed: bool


def median_sample(samples: list[Sample]) -> Sample:
    """Of those in which no thread was pre-empted, if there are some."""
    chosen = [sample for sample in samples if sample.undisturbed] or samples
    return sorted(chosen, key=lambda sample: sample.seconds)[len(chosen) // 2]


def timed_steps(engine: Engine, call: Callable[[], None]) -> list[Sample]:
    """Steps one after another; the first finds threads asleep and counts as none."""
    samples: list[Sample] = []
    try_set_real_time_priority(True)
    engine.thread_seconds_by_work()
    call()
    until = time.perf_counter() + BURST
    while not samples or time.perf_counter() < until:
        engine.thread_seconds_by_work()
        before, start = involuntary_switches(), time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        samples.append(Sample(seconds, engine.thread_seconds_by_work(), involuntary_switches() == before))
    engine.thread_seconds_by_work(False)
    try_set_real_time_priority(False)
    return samples


class Steps:
    """A shape's steps in one format, timed on this machine."""

    def __init__(self, sizes: Sizes, kernel: str, context: int, rounds: int, library: ctypes.CDLL):
        self.shape = Shape(kernel, 1.0, sizes).whole()
        self.shape.weights = in_one_block(self.shape.weights)
        self.schedules, self.rounds = Schedules(self.shape, library), rounds
        self.engines = {n: Engine(self.shape.plan, self.shape.weights, n, copy_weights=False) for n in (1, 2)}
        self.calls = {"token": Call(1, context), "prompt": Call(PROMPT, 0)}
        self.context = context

    def run(self, name: str, threads: int) -> Callable[[], None]:
        engine = self.engines[threads]
        return decode_step(engine, self.context) if name == "token" else prefill(engine, PROMPT)

    def measure(self, name: str) -> dict[int, Sample]:
        """The median step by threads, which take turns."""
        calls = {n: self.run(name, n) for n in self.engines}
        samples: dict[int, list[Sample]] = {n: [] for n in calls}
        for turn in range(self.rounds):
            for n in calls if turn % 2 else reversed(calls):
                samples[n] += timed_steps(self.engines[n], calls[n])
        return {n: median_sample(of) for n, of in samples.items()}

    def seconds_per_unit_by_kind(self, call_name: str, whole: Sample, known: dict[str, float]) -> dict[str, float]:
        """Seconds of a unit of each kind of work with one thread, and those outside of the schedule."""
        units: dict[str, float] = defaultdict(float)
        for task in self.schedules.work(self.calls[call_name], 1):
            units[task.kind] += task.units[0]
        result = dict(known)
        for kind in [kind for kind in units if kind not in known]:
            behind = units[f"{kind} of one row"] * known.get(f"{kind} of one row", 0.0)  # the last token's, of a prompt
            result[kind] = max(0.0, whole.spent[kind.removesuffix(" of one row")] - behind) / units[kind]
        result["outside"] = whole.seconds - sum(whole.spent.values())
        return result


def memory_bytes_per_second(threads: int) -> float:
    """Bytes a second of memory that no cache holds."""
    contender = memory_read_contender(READ_BYTES, threads)
    for _ in range(3):
        run_burst(contender, 0.3)
    return READ_BYTES / contender.seconds


def predicted_and_measured_rows(
    measured: dict[int, Sample], work: dict[int, list[Work]], costs: dict[str, dict[str, float]], here, meeting
) -> list:
    """Of one and two threads here: measured milliseconds, and those predicted from costs of either shape."""
    return [
        {
            "threads": n,
            "measured_ms": round(1e3 * sample.seconds, 3),
            **{
                f"by_{name}_ms": round(1e3 * predict(work[n], c, here[n], meeting)["seconds"], 3)
                for name, c in costs.items()
            },
        }
        for n, sample in measured.items()
    ]


def compare(name: str, steps: dict[str, Steps], here: dict[int, Machine], meeting: tuple) -> Iterator[tuple[str, dict]]:
    """For each shape what was measured, and what is foreseen of more cores."""
    measured = {shape: {call: one.measure(call) for call in one.calls} for shape, one in steps.items()}
    costs: dict[str, dict[str, dict[str, float]]] = {}
    for shape, one in steps.items():
        token = one.seconds_per_unit_by_kind("token", measured[shape]["token"][1], {})
        costs[shape] = {
            "token": token,
            "prompt": one.seconds_per_unit_by_kind("prompt", measured[shape]["prompt"][1], token),
        }
    for shape, one in steps.items():
        (other,) = set(steps) - {shape}
        for call, description in one.calls.items():
            both = {"own": costs[shape][call], "other": costs[other][call]}
            work = {n: one.schedules.work(description, n) for n in {m.threads for m in (*MACHINES, *here.values())}}
            facts = {"shape": shape, "weights": name, "step": call}
            for row in predicted_and_measured_rows(measured[shape][call], work, both, here, meeting):
                yield "measured", facts | row
            for machine in MACHINES:
                parts = predict(work[machine.threads], both["own"], machine, meeting)
                whole = parts.pop("seconds")
                shares = {part: round(seconds / whole, 3) for part, seconds in parts.items()}
                yield "predicted", facts | {"machine": machine.title, "ms": round(1e3 * whole, 3), **shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (("context", int, 512), ("rounds", int, 5), ("only", str, ""), ("json", Path, None)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    chosen = parser.parse_args()
    built = library()
    meeting = tuple(min(measure(20_000) for _ in range(20)) for measure in (built.barrier_seconds, built.line_seconds))
    speeds = {n: memory_bytes_per_second(n) for n in (1, 2)}
    here = {
        n: Machine(n, read=math.inf) for n in speeds
    }  # reading is in the costs of one thread, and two read twice as much
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine_facts(),
        "meeting_of_two_ns": round(1e9 * meeting[0]),
        "line_between_cores_ns": round(1e9 * meeting[1]),
        "read_GB_s": {n: round(speed / 1e9, 1) for n, speed in speeds.items()},
        "measured": [],
        "predicted": [],
    }
    print(json.dumps({key: value for key, value in result.items() if value != []}))
    for name in chosen.only.split(",") if chosen.only else KERNELS:
        steps = {
            shape: Steps(sizes, KERNELS[name], chosen.context, chosen.rounds, built) for shape, sizes in SHAPES.items()
        }
        for table, row in compare(name, steps, here, meeting):
            result[table].append(row)
            print(table, *(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
    if chosen.json and chosen.json.exists() and chosen.only:  # the other formats are those of an earlier run
        earlier = json.loads(chosen.json.read_text("utf-8"))
        for table in ("measured", "predicted"):
            result[table] += [row for row in earlier[table] if row["weights"] not in chosen.only.split(",")]
            result[table].sort(key=lambda row: (list(SHAPES).index(row["shape"]), list(KERNELS).index(row["weights"])))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
