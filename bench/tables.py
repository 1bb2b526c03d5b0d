"""Tables of the pages, made from what measurements wrote as JSON.

    python -m bench.tables [NAME...]

A table stands in its page between `<!-- table: NAME -->` and `<!-- end of table -->`. `make bench-NAME` runs
`bench/NAME.py`, which writes docs/measurements/data/NAME.json, and replaces the table; `library` is of recipes/effects.json.
A JSON of columns and rows (`bench.json_table`) is a table without a line here.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.task_answers import pruned_task_rows

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "docs" / "measurements" / "data"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARKS = re.compile(r"(?<=<!-- table: )(\w+)( -->\n).*?(?=<!-- end of table -->)", re.S)


def adapter_rows(measured: dict[str, Any]) -> list[tuple]:
    """Milliseconds of a call by contender."""
    return [("call", "ms"), *((name, f"{1000 * seconds:.1f}") for name, seconds in measured["seconds"].items())]


def latency_under_load_rows(measured: dict[str, tuple[float, float]]) -> list[tuple]:
    """95th percentiles in ms, those of the mildest load first."""
    rows = sorted(measured.items(), key=lambda row: row[1][1])
    return [
        ("load", "alone", "loaded", "times"),
        *((name, f"{a * 1e3:.0f}", f"{b * 1e3:.0f}", f"{b / a:.1f}") for name, (a, b) in rows),
    ]


def tune_rows(measured: dict[str, Any]) -> list[tuple]:
    """A search for each wish beside the best of the matrix."""
    verdicts = {True: "hold", False: "one misses"}
    head = ("wish", "chosen", "best of the matrix", "behind", "share of the matrix's time", "bounds on unread rows")
    return [head] + [
        (
            row["wish"],
            row.get("chosen", "none"),
            row["best"],
            percent(max(row["behind"], 0), 1) if row.get("held_out") else "",
            percent(row["share"], 1),
            verdicts.get(row.get("held_out"), ""),
        )
        for row in measured["rows"]
    ]


def mixed_format_rows(measured: dict[str, dict[str, tuple]]) -> list[tuple]:
    """Divergences in nats a token; of a mixed point how much lower than the best single format of no more bytes."""
    singles, all_points = measured["singles"], measured["singles"] | measured["mixed"]
    rows: list[tuple] = [("point", "MiB", "like text", "lower", "unlike text", "lower")]
    for title, (size, *losses) in sorted(all_points.items(), key=lambda point: point[1]):
        cells = [title, f"{size / 2**20:.2f}"]
        for index, loss in enumerate(losses, 1):
            rivals = [point[index] for point in singles.values() if point[0] <= size * 1.001]
            gain = 1 - loss / min(rivals) if rivals and title in measured["mixed"] else 0
            cells += [f"{loss:.4f}", percent(gain) if gain > 0 else ""]
        rows.append(tuple(cells))
    return rows


def mixed_speed_rows(measured: dict[str, dict[str, Any]]) -> list[tuple]:
    """Divergences in nats a token beside tokens a second; of a mixed point how much lower than the best single
    technique that is no slower, within 2 %."""
    rows: list[tuple] = [
        ("point", "tokens/s", "lowest to highest", "MiB", "like text", "lower", "unlike text", "lower")
    ]
    for name, row in sorted(measured.items(), key=lambda point: -point[1]["tokens_s"]):
        cells = [
            name,
            f"{row['tokens_s']:.0f}",
            "{:.0f} to {:.0f}".format(*row["range"]),
            f"{row['bytes'] / 2**20:.2f}",
        ]
        for text in ("heldout", "unlike"):
            rivals = [
                single[text]
                for title, single in measured.items()
                if not title.startswith("mixed") and single["tokens_s"] >= 0.98 * row["tokens_s"]
            ]
            gain = 1 - row[text] / min(rivals) if rivals and name.startswith("mixed") else 0
            cells += [f"{row[text]:.4f}", percent(gain) if gain > 0 else ""]
        rows.append(tuple(cells))
    return rows


def library_effect_rows(measured: dict[str, Any]) -> list[tuple]:
    """Effects on SmolLM2 of recipes that are no teaching recipes."""
    rows: list[tuple] = [("recipe", "share of the bytes", "perplexity before", "after")]
    for name, recipe in measured["recipes"].items():
        if '"""Teaching recipe' in (ROOT / "recipes" / f"{name}.effspec").read_text("utf-8"):
            continue
        for effect in (e for e in recipe["effects"] if e["on"].startswith("SmolLM2")):
            values = {metric.partition("(")[0]: pair for _, metric, _, *pair in effect["rows"]}
            (size, smaller), (before, after) = values["bytes"], values["perplexity"]
            rows.append((f"`{name}`", percent(smaller / size), f"{before:.2f}", f"{after:.2f}"))
    return rows


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points by their last race, those of effc first."""
    points = {(row["engine"], row["label"]): row for row in sorted(rows, key=lambda row: row["date"])}
    return sorted(
        points.values(), key=lambda row: (row["engine"] != "effc", row["engine"], -row["MB"], row["perplexity"])
    )


TEXTS = ("kjv", "docstrings", "code")


def quality_and_speed_table(measured: dict[str, Any]) -> list[tuple]:
    """Points of tokens a second against perplexity, each with the day of the race it ran in."""
    head = ("engine", "file", "MB", *TEXTS, "geometric mean", "above the original", "divergence")
    return [(*head, "tokens/s", "lowest to highest", "512 tokens, ms", "race")] + [
        (
            *(row["engine"], row["label"], str(row["MB"])),
            *(f"{row[text]:.2f}" for text in (*TEXTS, "perplexity")),
            "{:+.2f} ± {:.2f} %".format(*(100 * value for value in row["loss"])),
            f"{sum(row['divergence'].values()) / len(TEXTS):.4f}",
            *(f"{row['tokens_s']:.0f}", "{:.0f} to {:.0f}".format(*row["range"]), str(row["prompt_ms"]), row["date"]),
        )
        for row in latest(measured["rows"])
    ]


HEADLINE = {
    ("llama.cpp", "q8_0"): "llama.cpp q8_0",
    ("llama.cpp", "iq4_nl, imatrix"): "llama.cpp iq4_nl with an importance matrix",
    ("OpenVINO", "int8"): "OpenVINO GenAI int8",
    ("effc", "int8, int16 inputs, scaled"): "**effc** `native(weights: int8, inputs: int16)` after `quantize.scale`",
    ("effc", "int4, scaled, gptq"): "**effc** `native` int4 after `quantize.scale` and `quantize.gptq`",
}


def headline_rows(measured: dict[str, Any]) -> list[tuple]:
    """Five points of `frontier_intel`, for README."""
    points = {(row["engine"], row["label"]): row for row in latest(measured["rows"])}
    head = ("SmolLM2-135M on two cores of an Intel Xeon with AMX", "MB", "perplexity", "tokens/s", "512 tokens read")
    return [head] + [
        (
            *(name, f"{points[key]['MB']}", f"{points[key]['perplexity']:.2f}", f"{points[key]['tokens_s']:.0f}"),
            f"{points[key]['prompt_ms']} ms",
        )
        for key, name in HEADLINE.items()
    ]


GOAL = 1.3  # times as fast as another engine


def frontier_rival_rows(measured: dict[str, Any]) -> list[tuple]:
    """For each point of another engine, the fastest of ours of the same race whose perplexity is no higher: of those that
    decode and read prompts at least `GOAL` times as fast, where there are some; a trained one only where no other is."""
    rows: list[tuple] = [("no worse than", "ours", "decodes, times as fast", "reads 512 tokens, times as fast")]

    def advantages(rival: dict, row: dict) -> tuple[float, float]:
        return row["tokens_s"] / rival["tokens_s"], rival["prompt_ms"] / row["prompt_ms"]

    for rival in (row for row in latest(measured["rows"]) if row["engine"] != "effc"):
        better = [
            row
            for row in measured["rows"]
            if row["engine"] == "effc" and row["date"] == rival["date"] and row["perplexity"] <= rival["perplexity"]
        ]
        order = [
            ("trained" not in row["label"], min(advantages(rival, row)) >= GOAL, row["tokens_s"]) for row in better
        ]
        best = better[order.index(max(order))] if better else None
        cells = (best["label"], *(f"{ratio:.2f}" for ratio in advantages(rival, best))) if best else ("none", "", "")
        rows.append((f"{rival['engine']} {rival['label']}", *cells))
    return rows


def sparse_amx_rows(measured: dict[str, Any]) -> list[tuple]:
    """Seconds of SparAMX's fastest kernel of the same kind of weights over those of effc's, by layer, zeros and rows."""
    lines: dict[tuple[str, float], dict[str, float]] = {}
    for row in measured["rows"]:
        cells = lines.setdefault((row["layer"], row["zeros"]), {})
        for weights, ratio in row["times_as_fast"].items():
            cells[f"{weights}, {row['rows']} row{'s' if row['rows'] > 1 else ''}"] = ratio
    columns = sorted(next(iter(lines.values())))
    head = ("layer", "zeros", *columns)
    return [head] + [
        (layer, percent(zeros), *(f"{cells[column]:.1f}" for column in columns))
        for (layer, zeros), cells in lines.items()
    ]


def many_cores_check_rows(measured: dict[str, Any]) -> list[tuple]:
    """Milliseconds of steps with one and two threads: measured, and as the model has them."""
    ways = {"by_own_ms": "costs of the shape itself", "by_other_ms": "costs of the other shape"}
    head = ("shape", "weights", "step", "threads", "measured, ms", *(f"predicted by {way}" for way in ways.values()))
    return [head] + [
        (
            *(str(row[key]) for key in ("shape", "weights", "step", "threads")),
            f"{row['measured_ms']:.1f}",
            *(
                "(its costs)"
                if row["threads"] == 1 and way == "by_own_ms"
                else f"{row[way]:.1f} ({100 * (row[way] / row['measured_ms'] - 1):+.0f} %)"
                for way in ways
            ),
        )
        for row in measured["measured"]
    ]


def many_cores_rows(measured: dict[str, Any]) -> list[tuple]:
    """Predicted milliseconds of steps by the machine."""
    lines: dict[tuple[str, ...], dict[str, float]] = {}
    for row in measured["predicted"]:
        lines.setdefault((row["shape"], row["weights"], row["step"]), {})[row["machine"]] = row["ms"]
    machines = list(next(iter(lines.values())))
    return [("shape", "weights", "step, ms", *machines)] + [
        (*line, *(f"{cells[machine]:.1f}" for machine in machines)) for line, cells in lines.items()
    ]


def many_cores_share_rows(measured: dict[str, Any]) -> list[tuple]:
    """Parts of a token's time on many cores beside shared work; int8."""
    parts = {
        "barriers": "barriers",
        "memory": "waiting for memory",
        "uneven": "uneven shares",
        "undivided": "undivided",
    }
    rows = [row for row in measured["predicted"] if row["step"] == "token" and row["weights"] == "int8"]
    return [("shape", "machine", *parts.values())] + [
        (row["shape"], row["machine"], *(percent(row[part]) for part in parts))
        for row in rows
        if int(row["machine"].split()[0]) >= 8
    ]


def llama_1b_rows(measured: dict[str, Any]) -> list[tuple]:
    """Formats of Llama 3.2 1B's shapes, those of effc first."""
    head = ("engine", "weights", "MB", "tokens/s", "lowest to highest", "512 tokens, ms", "resident MiB", "opens in, s")
    return [head] + [
        (
            *(row["engine"], row["label"], str(row["MB"]), f"{row['tokens_s']:.1f}"),
            "{:.1f} to {:.1f}".format(*row["range"]),
            *(str(row["prompt_ms"]), str(row["MiB"]), f"{row['open_s']:.1f}"),
        )
        for row in sorted(measured["rows"], key=lambda row: (row["engine"] != "effc", row["engine"], -row["MB"]))
    ]


def servers_under_load_rows(measured: dict[str, Any]) -> list[tuple]:
    """Milliseconds of each server under each load."""
    columns = ("first_p50_ms", "first_p95_ms", "token_p50_ms", "token_p95_ms", "token_longest_ms")
    head = ("load", "server", "first token, p50", "p95", "between tokens, p50", "p95", "longest", "tokens/s")
    return [head] + [
        (row["load"], row["server"], *(f"{row[column]:.0f}" for column in columns), f"{row['tokens_s']:.0f}")
        for row in measured["rows"]
    ]


TABLES: dict[str, tuple[Path, Callable[[Any], list[tuple]]]] = {
    "loads": (DATA / "loads.json", latency_under_load_rows),
    "servers": (DATA / "servers.json", servers_under_load_rows),  # of files of other engines: bench/servers.py
    "adapters": (DATA / "adapters.json", adapter_rows),
    "servers_vllm": (DATA / "servers_vllm.json", servers_under_load_rows),  # a run of its own: `--json FILE`
    "tune": (DATA / "tune.json", tune_rows),
    "mixed": (DATA / "mixed.json", mixed_format_rows),
    "mixed_speed": (DATA / "mixed_speed.json", mixed_speed_rows),  # `python -m bench.mixed_speed`
    "mixed_speed_smol": (DATA / "mixed_speed_smol.json", mixed_speed_rows),  # of SmolLM2: `--model FOLDER --once`
    "frontier": (DATA / "frontier.json", quality_and_speed_table),
    "frontier_rivals": (DATA / "frontier.json", frontier_rival_rows),
    "frontier_intel": (DATA / "frontier_intel.json", quality_and_speed_table),  # of another machine: `--json FILE`
    "frontier_intel_rivals": (DATA / "frontier_intel.json", frontier_rival_rows),
    "sparse_amx": (DATA / "sparse_amx.json", sparse_amx_rows),
    "pruned_tasks": (DATA / "pruned_tasks.json", pruned_task_rows),
    "many_cores_check": (DATA / "many_cores.json", many_cores_check_rows),
    "many_cores": (DATA / "many_cores.json", many_cores_rows),
    "many_cores_shares": (DATA / "many_cores.json", many_cores_share_rows),
    "llama_1b": (DATA / "llama_1b.json", llama_1b_rows),
    "headline": (DATA / "frontier_intel.json", headline_rows),
    "tune_amd": (DATA / "tune_amd.json", tune_rows),  # of another machine: `python -m bench.tune --json FILE`
    "tune_smollm2": (DATA / "tune_smollm2.json", tune_rows),  # `python -m bench.tune --model ... --bits 16 --json FILE`
    "library": (ROOT / "recipes" / "effects.json", library_effect_rows),
}


def plain_rows(measured: dict[str, Any]) -> list[tuple]:
    """A table as `bench.json_table` writes it."""
    return [tuple(row) for row in (measured["columns"], *measured["rows"])]


def is_plain(path: Path) -> bool:
    measured = json.loads(path.read_text("utf-8"))
    return isinstance(measured, dict) and "columns" in measured


TABLES |= {path.stem: (path, plain_rows) for path in sorted(DATA.glob("*.json")) if is_plain(path)}


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def markdown(rows: Iterable[tuple]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *body]) + "\n"


def table(name: str) -> str:
    """Markdown of a table from its JSON."""
    path, rows = TABLES[name]
    return markdown(rows(json.loads(path.read_text("utf-8"))))


def with_tables(text: str, names: Iterable[str] = TABLES) -> str:
    """A page's text with those tables as their JSON has them."""
    return MARKS.sub(lambda mark: mark[1] + mark[2] + table(mark[1]) if mark[1] in names else mark[0], text)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text("utf-8")
        if (replaced := with_tables(text, sys.argv[1:] or TABLES)) != text:
            page.write_text(replaced, "utf-8")
            print(page.relative_to(ROOT))
