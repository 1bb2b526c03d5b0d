"""Perplexity of SmolLM2-135M while it decodes over a cache of which `lower.sparse_kv` keeps a share, and seconds of a token.

    python -m bench.pruned_cache FOLDER [--rows 12] [--contexts 2048 7168] [--rounds 9] [--json FILE]

FOLDER is that of bench.smol, which says what the texts are, and keeps measured rows in rows.json. A row of 768 tokens is
read to its 512th, the other 256 are fed one by one, and their perplexity is counted. `more` is how much higher it is than
over the whole cache, with half of the 95 % interval over rows, which are compared one by one. The newest 64 tokens and the
first 32 stay whole, as by default. Seconds of a token are of one sequence in torch, float32, one thread, behind contexts of
so many tokens; contenders take turns, median of the ratios to the whole cache in transformers' StaticCache, which has room for all
tokens from the start; its default cache copies itself at each token ("grows by copies"). The published kernel prunes a
prompt's cache once and freezes it; this one goes on.
"""

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from effc.compiler.core.fingerprint import machine_facts
from effc.compiler.models.rows.decoding import cache_kwargs_of, decoded_row_nll

from bench import smol
from bench.json_table import add_json_option, write_table
from bench.row_store import RowStore
from bench.tables import markdown
from bench.text_quality import half_width

PROMPT, DECODED = 512, 256  # tokens of a row
SHARES = ((100, 100), (70, 70), (50, 50), (30, 30), (100, 50), (50, 100), (100, 30), (30, 100))  # of keys, of values
TIMED = ((70, 70), (50, 50), (30, 30))
WHOLE = (100, 100)
COPIED = "grows by copies"


def model_with_cache(folder: Path, keys: int, values: int) -> Any:
    """SmolLM2 that keeps so many per cent of its cached keys and values; as it is for 100 and 100."""
    shares = f"keep: {min(keys, values)}%, keys: {keys}%, values: {values}%"
    step = f"kv = lower.sparse_kv({shares}, data: calib, divergence: 100)"
    build = smol.build_of(
        folder, f"cache-{keys}-{values}", "" if (keys, values) == WHOLE else step, model=smol.base(folder)
    )
    return smol.finished(build).model


def text_rows(folder: Path, row_count: int) -> dict[str, torch.Tensor]:
    """Token ids [rows, PROMPT + DECODED] of each held-out text, from its beginning."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smol.write_rescaled(folder))
    length = PROMPT + DECODED
    rows = {}
    for name, path in zip(smol.HELD_OUT, (folder / "docs.txt", smol.BIBLE / "heldout.txt"), strict=True):
        ids = tokenizer(path.read_text("utf-8"), verbose=False).input_ids
        count = min(row_count, len(ids) // length)
        rows[name] = torch.tensor(ids[: count * length]).view(count, length)
    return rows


def decoded_nats(model: Any, ids: torch.Tensor) -> list[float]:
    """Mean nats of the decoded tokens of each row of `ids` [rows, PROMPT + DECODED]."""
    return [nats / DECODED for nats in decoded_row_nll(model, ids, DECODED).nats]


def quality_row(folder: Path, keys: int, values: int, texts: dict[str, torch.Tensor]) -> dict[str, Any]:
    model = model_with_cache(folder, keys, values)
    return {"keys": keys, "values": values, **{name: decoded_nats(model, ids) for name, ids in texts.items()}}


def seconds_of_tokens(folder: Path, context: int, rounds: int) -> dict[Any, list[float]]:
    """Seconds of a decoded token behind `context` tokens, by shares; contenders take turns."""
    from transformers import StaticCache

    steps = 8
    ids = torch.randint(1000, (1, context), generator=torch.Generator().manual_seed(0))
    models: dict[Any, Any] = {shares: model_with_cache(folder, *shares) for shares in (WHOLE, *TIMED)}
    models[COPIED] = models[WHOLE]
    static = StaticCache(config=models[WHOLE].config, max_cache_len=context + steps * (rounds + 1))
    seconds: dict[Any, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        torch.set_num_threads(os.cpu_count() or 1)  # the prompt is not timed
        caches = {
            name: cache_kwargs_of(model(input_ids=ids, use_cache=True, **({"cache": static} if name == WHOLE else {})))
            for name, model in models.items()
        }
        torch.set_num_threads(1)
        for turn in range(rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                for _ in range(steps):
                    out = model(input_ids=ids[:, :1], use_cache=True, **caches[name])
                    caches[name] = cache_kwargs_of(out)
                if turn:
                    seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def table_rows(quality: list[dict[str, Any]], speed: dict[int, dict[Any, list[float]]]) -> list[list[str]]:
    """Rows of cells, the head first."""
    whole = quality[0]
    head = ["keys kept", "values kept"]
    for name in smol.HELD_OUT:
        head += [name, "more"]
    rows = [head + [f"a token behind {context:,}" for context in speed]]
    for row in quality:
        shares = (row["keys"], row["values"])
        cells = [f"{share}%" for share in shares]
        for name in smol.HELD_OUT:
            cells.append(f"{math.exp(statistics.mean(row[name])):.2f}")
            changes = [nats - before for nats, before in zip(row[name], whole[name], strict=True)]
            more, width = math.expm1(statistics.mean(changes)), half_width(changes)
            cells.append("" if row is whole else f"{more:+.1%} ± {(1 + more) * width:.1%}")
        rows.append(cells + [_time_text(seconds, shares) for seconds in speed.values()])
    blank = [""] * (len(head) - 2)
    rows.append(["100%", f"100%, {COPIED}", *blank, *(_time_text(seconds, COPIED) for seconds in speed.values())])
    return rows


def _time_text(seconds: dict[Any, list[float]], name: Any) -> str:
    """Milliseconds of a token, and how many times as fast as over the whole static cache; "" where it was not timed."""
    if name not in seconds:
        return ""
    ratios = [base / ours for ours, base in zip(seconds[name], seconds[WHOLE], strict=True)]
    text = f"{statistics.median(seconds[name]) * 1e3:.0f} ms"
    return text if name == WHOLE else f"{text} ({statistics.median(ratios):.2f}x)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--contexts", type=int, nargs="*", default=[2048, 7168])
    parser.add_argument("--rounds", type=int, default=9)
    add_json_option(parser)
    options = parser.parse_args()
    folder = options.folder.resolve()
    smol.write_texts(folder)
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    texts = text_rows(folder, options.rows)
    store = RowStore(folder / "rows.json", {"rows": options.rows})
    for keys, values in SHARES:
        if not any((row["keys"], row["values"]) == (keys, values) for row in store.rows):
            store.add(quality_row(folder, keys, values, texts))
        print(f"keys {keys}%, values {values}%: done", flush=True)
    speed = {context: seconds_of_tokens(folder, context, options.rounds) for context in options.contexts}
    rows = table_rows(store.rows, speed)
    write_table(options.json, rows[0], rows[1:])
    print(markdown(rows))


if __name__ == "__main__":
    main()
