"""Print what `effc serve` gives: tokens per second and time to the first one, at several requests at once.

    python -m bench.serve MODEL [--threads 2] [--at-once 1 4 16] [--words 60] [--new 64] [--long 800]
                                      [--rounds 3] [--json FILE]

MODEL is what `effc serve` takes. Every request continues another part of Python's own language reference. The
client is a process of its own on the same machine, and reads streams. Beside it, "engine" is the same
number of sequences stepped by the engine in a loop, without sampling, text and HTTP. The last row is the
longest wait between two tokens of a running answer while a prompt of --long words comes in, and while none
does.
"""

import argparse
import asyncio
import json
import os
import pydoc_data.topics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import httpx

EFFC = (sys.executable, "-c", "import sys; from effc.compiler.cli.main import main; sys.exit(main())")
TEXT = " ".join(" ".join(pydoc_data.topics.topics.values()).split()).split(" ")


@contextmanager
def start_server(*arguments: str, threads: int) -> Iterator[str]:
    """URL of `effc serve` with these arguments; the server ends with the block."""
    command = [*EFFC, "serve", *arguments, "--port", "0", "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip().partition(" at ")[2]
    finally:
        process.terminate()
        process.wait()


async def stream_answer(client: httpx.AsyncClient, prompt: str, max_new_tokens: int) -> list[float]:
    """Times at which text came, the first one that of the request; the last entry is the number of tokens."""
    body = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times, count = [time.perf_counter()], 0
    async with client.stream("POST", "/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if any(choice["text"] for choice in chunk["choices"]):
                times.append(time.perf_counter())
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
    return [*times, count]


def prompts_of_python_docs(count: int, words: int, start: int = 0) -> list[str]:
    return [" ".join(TEXT[(start + i) * 997 % 20_000 :][:words]) for i in range(count)]


async def measure_concurrent(
    url: str, n_clients: int, prompt_words: int, max_new_tokens: int, start: int
) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began = time.perf_counter()
        found = await asyncio.gather(
            *(
                stream_answer(client, prompt, max_new_tokens)
                for prompt in prompts_of_python_docs(n_clients, prompt_words, start)
            )
        )
    tokens, seconds = sum(times[-1] for times in found), max(times[-2] for times in found) - began
    firsts = [times[1] - times[0] for times in found]
    return {"tokens_per_second": tokens / seconds, "first": median(firsts), "last_first": max(firsts)}


async def longest_stalls(
    url: str, prompt_words: int, long_prompt_words: int, max_new_tokens: int
) -> tuple[float, float]:
    """The longest wait between pieces of four answers, with and without a long prompt coming in."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        waits = []
        for more in ([], prompts_of_python_docs(1, long_prompt_words, 91)):
            running = [
                asyncio.create_task(stream_answer(client, prompt, max_new_tokens))
                for prompt in prompts_of_python_docs(4, prompt_words, 50 + len(more))
            ]
            await asyncio.sleep(0.5)
            await asyncio.gather(*(stream_answer(client, prompt, 1) for prompt in more))
            found = await asyncio.gather(*running)
            waits.append(max(b - a for times in found for a, b in pairwise(times[1:-1])))
    return waits[1], waits[0]


def engine_throughput(
    model_folder: str, threads: int, sequence_counts: list[int], words: int, max_new_tokens: int
) -> dict[int, float]:
    """Tokens per second of the engine alone; nothing where the model has none."""
    import effc
    from effc.compiler.driver.models import _load_tokenizer_or_none, is_artifact

    path = Path(model_folder)
    if not (path.is_dir() and is_artifact(path) and (path / "native").is_dir()):
        return {}
    own, tokenizer = effc.load(path, threads=threads).engine, _load_tokenizer_or_none(path / "native")
    found = {}
    for count in sequence_counts:
        began = time.perf_counter()
        for sequence, prompt in enumerate(prompts_of_python_docs(count, words)):
            ids = tokenizer(prompt)["input_ids"]
            own.run(ids, [sequence] * len(ids), [len(ids) - 1])
        for _ in range(max_new_tokens - 1):
            own.run([300] * count, list(range(count)), list(range(count)))
        found[count] = count * max_new_tokens / (time.perf_counter() - began)
        for sequence in range(count):
            own.forget(sequence)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--long", type=int, default=800)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    alone = engine_throughput(given.model, given.threads, given.at_once, given.words, given.new)
    rows: dict[int, list[dict[str, float]]] = {count: [] for count in given.at_once}
    with start_server(given.model, "--name", "model", threads=given.threads) as url:
        asyncio.run(measure_concurrent(url, 1, given.words, 4, 99))  # warm
        for turn in range(given.rounds):
            for count in given.at_once:
                rows[count].append(asyncio.run(measure_concurrent(url, count, given.words, given.new, 16 * turn)))
        long, plain = asyncio.run(longest_stalls(url, given.words, given.long, 4 * given.new))
    print(
        f"{given.model}, {given.threads} threads, {given.words} words in, {given.new} tokens out, medians "
        f"of {given.rounds} rounds\n"
    )
    print("at once   tokens/s   engine   first token   last one's first")
    best = {count: {name: median(row[name] for row in found) for name in found[0]} for count, found in rows.items()}
    for count, row in best.items():
        beside = f"{alone[count]:8.1f}" if alone else "       -"
        print(
            f"{count:7}   {row['tokens_per_second']:8.1f} {beside}   {row['first'] * 1e3:8.0f} ms"
            f"   {row['last_first'] * 1e3:13.0f} ms"
        )
    print(
        f"\nlongest wait between tokens of four answers: {long * 1e3:.0f} ms while {given.long} words come "
        f"in, {plain * 1e3:.0f} ms otherwise"
    )
    if given.json:
        given.json.write_text(json.dumps({"served": best, "engine": alone, "waits": [long, plain]}, indent=2))


if __name__ == "__main__":
    main()
