"""Print tokens a second against held-out perplexity: SmolLM2 in this engine's formats and in those of other engines.

    python -m bench.frontier FOLDER [--threads 2] [--rounds 9] [--only NAME ...] [--json FILE] [--no-speed | --raced]

The model is that of smol.py, which no 4-bit format gets back. Each contender lives in a process of its own; they take
turns of 16 tokens, decoding greedily from contexts of 64 to 128, then of a prompt of 512 tokens, with real-time priority
where the system allows it, so that other work on the machine hardly counts. Perplexity, and divergence from the model in
float32, is of what each computes itself of 80 rows of 256 tokens of each of three texts: other books of the King James
Bible (`kjv`) and docstrings of Python's library (`docstrings`), which resemble what effc's and llama.cpp's importance
matrices are calibrated on, and that library's code (`code`), which does not. Sparse and pruned points are trained for
`--steps` steps; `bf16, trained` and `int8, trained` are the whole model after as many, since training on text like the
first two helps by itself.

llama.cpp takes part where `llama_cpp` imports; its files are made by its own quantiser from float16. ik_llama.cpp reads
the same files, where IK_LLAMA_BENCH in the environment names the library that ik_llama.cc makes. OpenVINO, ONNX Runtime
and torchao take part where RIVALS_PYTHON names an interpreter that has them (rivals.py). FOLDER keeps what is done.
"""

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import rivals, smol, text_quality
from bench.frontier_models import IK, IMATRIX, LLAMA, NATIVE_VARIANTS, bytes_of, files_of, write_contestant_if_absent

REST = 0.03  # seconds before a turn: threads of the one before spin for some milliseconds
PROMPT_ROUNDS = 3
TEXTS = ("kjv", "docstrings", "code")
ROWS, TOKENS = 80, 256  # of each text
ENGINES = ("OpenVINO", "ONNX Runtime", "torchao")


def answer_stdin_commands(folder: Path, contestant_name: str, threads: int) -> None:
    """Answer lines of stdin: `decode` with seconds a token, `prompt` with seconds, `score TEXT` with JSON."""
    from effc.compiler.transforms.lowering.racing import try_set_real_time_priority

    from bench.decoders import Ik, Llama, Own, silent_llama

    torch.set_num_threads(threads)
    rows = json.loads((folder / "rows.json").read_text())
    files = files_of(folder, contestant_name)
    if contestant_name in NATIVE_VARIANTS:
        contestant: Any = Own(files, threads)
    elif contestant_name in IK:
        contestant = Ik(files / "model.gguf", threads)
    else:
        with silent_llama():
            contestant = Llama(files / "model.gguf", threads)
    ids = [token for row in rows["kjv"] for token in row]
    contestant.prompt(ids[:64])
    print("ready", flush=True)
    for turn, line in enumerate(sys.stdin):
        verb, _, text = line.strip().partition(" ")
        if verb == "score":
            print(json.dumps(text_quality.score(folder, text, contestant.logits)), flush=True)
            continue
        raised = try_set_real_time_priority(True)
        print(seconds_per_token_or_prompt(contestant, verb, ids[turn : turn + rivals.PROMPT]), flush=True)
        if raised:
            try_set_real_time_priority(False)


def seconds_per_token_or_prompt(contestant: Any, verb: str, ids: list[int]) -> float:
    """Seconds a token of a turn, or of a prompt; contexts longer than a turn's go back to its first 64 tokens."""
    if verb == "decode":
        contestant.step()
    started = time.perf_counter()
    if verb == "prompt":
        contestant.prompt(ids)
        return time.perf_counter() - started
    for _ in range(rivals.STEPS):
        contestant.step()
    return (time.perf_counter() - started) / rivals.STEPS


class Contestant:
    def __init__(self, folder: Path, name: str, threads: int):
        options = [str(folder), "--serve", name, "--threads", str(threads)]
        command = [sys.executable, "-m", "bench.frontier", *options]
        if name in rivals.RIVALS:
            python, files = os.environ["RIVALS_PYTHON"], str(files_of(folder, name))
            command = [python, "-m", "bench.rivals", "serve", name, str(folder), files, str(threads)]
        self.name, self.child = name, subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        while (line := self.child.stdout.readline()) != "ready\n":  # libraries print their banners
            assert line, f"{name} did not begin"

    def ask(self, line: str) -> Any:
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        return json.loads(self.child.stdout.readline())

    def end(self) -> None:
        self.child.stdin.close()
        self.child.wait()


def sources_of(pick: Callable[[str], str]) -> str:
    """Python's own library, module by module: what `pick` takes of each."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return "\n\n".join(pick(file.read_text("utf-8", "replace")) for file in files)


def docstrings(source: str) -> str:
    tree = ast.parse(source)
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    return "\n\n".join(text for node in nodes if len(text := ast.get_docstring(node) or "") > 200)


def code(source: str) -> str:
    return ast.unparse(ast.parse(source))  # without its comments


def write_rows(folder: Path) -> None:
    from effc.dsl.checker.values import DataRef

    (folder / "docstrings.txt").write_text(sources_of(docstrings))
    (folder / "code.txt").write_text(sources_of(code))
    ctx = smol.build_of(folder, "frontier", "", model=smol.base(folder, "bfloat16")).ctx
    rows = {"calib": ctx.rows(DataRef("calib")).tolist()}
    for text, file in (("kjv", smol.BIBLE / "heldout.txt"), ("docstrings", "docstrings.txt"), ("code", "code.txt")):
        ids = ctx.tokenizer((folder / file).read_text(), verbose=False)["input_ids"]
        apart = len(ids) // ROWS  # rows from the whole text, none of them overlapping
        assert apart >= TOKENS, f"{text} has {len(ids)} tokens"
        rows[text] = [ids[start : start + TOKENS] for start in range(0, apart * ROWS, apart)]
    (folder / "rows.json").write_text(json.dumps(rows))


def write_references(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()

    def logits_of(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=torch.tensor([ids])).logits[0]

    text_quality.write_references(folder, logits_of)
    kept = folder / "quality.json"
    if not kept.exists():
        kept.write_text(json.dumps({t: text_quality.score(folder, t, logits_of) for t in TEXTS}))


def race(folder: Path, names: list[str], threads: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each, turn by turn: a token of `decode`, and a `prompt`."""
    players = [Contestant(folder, name, threads) for name in names]
    seconds: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prompt": []} for name in names}
    for verb in ["decode"] * (rounds + 1) + ["prompt"] * PROMPT_ROUNDS:
        for player in players:
            time.sleep(REST)
            seconds[player.name][verb].append(player.ask(verb))
    for player in players:
        player.end()
    return {name: {"decode": kinds["decode"][1:], "prompt": kinds["prompt"]} for name, kinds in seconds.items()}


def validation_scores(folder: Path, name: str, threads: int) -> dict[str, Any]:
    """Scores of the held-out texts, row by row; kept beside what they are of."""
    kept = files_of(folder, name) / f"{'ik_' if name in IK else ''}quality.json"
    if not kept.exists():
        player = Contestant(folder, name, threads)
        scores = {text: player.ask(f"score {text}") for text in TEXTS}
        player.end()
        kept.write_text(json.dumps(scores))
    return json.loads(kept.read_text())


def engine_and_label(name: str) -> tuple[str, str]:
    """The engine of a contestant, and its name without it."""
    if name in NATIVE_VARIANTS:
        return "effc", name.removeprefix("own ")
    engine = next((e for e in ENGINES if name.startswith(e)), name.partition(" ")[0])
    return engine, name.removeprefix(engine + " ")


def row_of(
    folder: Path, name: str, original: dict[str, Any], threads: int, earlier: dict[tuple[str, str], dict[str, Any]]
) -> dict[str, Any]:
    engine, label = engine_and_label(name)
    if (engine, label) in earlier:
        return {key: value for key, value in earlier[engine, label].items() if key not in SPEED}
    known = text_quality.summary(validation_scores(folder, name, threads), original)
    return {"engine": engine, "label": label, "MB": round(bytes_of(folder, name) / 1e6), **known}


SPEED = ("tokens_s", "range", "prompt_ms", "date")


def speed_of(seconds: dict[str, list[float]]) -> dict[str, Any]:
    rates = sorted(1 / s for s in seconds["decode"])
    figures = {"tokens_s": round(statistics.median(rates), 1), "range": [round(rates[0], 1), round(rates[-1], 1)]}
    return figures | {"prompt_ms": round(statistics.median(seconds["prompt"]) * 1000)}


def print_table(lines: list[dict[str, Any]]) -> None:
    form = "{:<44}{:>6}" + "{:>11}" * 4 + "{:>18}{:>12}{:>10}{:>16}{:>12}"
    heads = ("MB", *TEXTS, "mean", "loss, %", "divergence", "tokens/s", "lowest..highest", f"{rivals.PROMPT}, ms")
    print(form.format("", *heads), flush=True)
    for row in lines:
        loss, width = (100 * value for value in row["loss"])
        texts = [f"{row[text]:.2f}" for text in (*TEXTS, "perplexity")]
        spread = statistics.mean(row["divergence"].values())
        cells = [str(row["MB"]), *texts, f"{loss:+.2f} +- {width:.2f}", f"{spread:.4f}"]
        if "tokens_s" in row:
            cells += [f"{row['tokens_s']:.0f}", "{:.0f}..{:.0f}".format(*row["range"]), f"{row['prompt_ms']}"]
        print(form.format(f"{row['engine']} {row['label']}", *cells, *[""] * (10 - len(cells))), flush=True)
    for theirs in (row for row in lines if row["engine"] != "effc" and "tokens_s" in row):
        better = [row for row in lines if row["engine"] == "effc" and row["perplexity"] <= theirs["perplexity"]]
        best = max(better, key=lambda row: ("trained" not in row["label"], row["tokens_s"]), default=None)
        if best:
            faster, sooner = best["tokens_s"] / theirs["tokens_s"], theirs["prompt_ms"] / best["prompt_ms"]
        result = f"{best['label']}, decodes {faster:.2f}x, reads {sooner:.2f}x" if best else "none"
        print(f"no worse than {theirs['engine']} {theirs['label']}: {result} (goal 1.3x)", flush=True)


def write_json(lines: list[dict], file: Path, threads: int) -> None:
    """Add rows of this race, with today's date, to those of other days."""
    from effc.compiler.core.fingerprint import machine_facts

    machine = "{cpu} ({isa}), {0} threads".format(threads, **machine_facts())
    today = date.today().isoformat()
    earlier = json.loads(file.read_text())["rows"] if file.exists() else []
    raced = {(row["engine"], row["label"]) for row in lines}
    rows = [r for r in earlier if "loss" in r and (r["date"] != today or (r["engine"], r["label"]) not in raced)]
    rows += [row | {"date": today} for row in lines]
    facts = {"model": "SmolLM2-135M-Instruct", "machine": machine, "script": "bench/frontier.py"}
    lines_of_rows = ",\n  ".join(map(json.dumps, rows))
    file.write_text(json.dumps(facts, indent=1)[:-2] + f',\n "rows": [\n  {lines_of_rows}\n ]\n}}\n')


def contestants() -> list[str]:
    from bench.decoders import IK_LIBRARY

    names = list(NATIVE_VARIANTS)
    for library, theirs in (
        (find_spec("llama_cpp"), [*LLAMA, *IMATRIX]),
        (IK_LIBRARY, IK),
        (os.environ.get("RIVALS_PYTHON"), rivals.RIVALS),
    ):
        names += theirs if library else []
    return names


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=[*NATIVE_VARIANTS, *LLAMA, *IMATRIX, *IK, *rivals.RIVALS])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--quality-from", type=Path, help="JSON of another machine: perplexities of llama.cpp and ONNX Runtime"
    )
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--raced", action="store_true", help="speeds are those of the last race in FOLDER")
    parser.add_argument("--serve")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.serve:
        answer_stdin_commands(folder, options.serve, options.threads)
        return
    torch.set_num_threads(options.threads)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    names = options.only or contestants()
    smol.write_rescaled(folder)
    if not (folder / "rows.json").exists():
        write_rows(folder)
    write_references(folder)
    for name in names:
        write_contestant_if_absent(folder, name, options.steps)
    original = json.loads((folder / "quality.json").read_text())
    known = json.loads(options.quality_from.read_text())["rows"] if options.quality_from else []
    earlier = {(row["engine"], row["label"]): row for row in known if row["engine"] in ("llama.cpp", "ONNX Runtime")}
    last_race = folder / "race.json"
    if not (options.no_speed or options.raced):
        last_race.write_text(json.dumps(race(folder, names, options.threads, options.rounds)))
    seconds = {} if options.no_speed else json.loads(last_race.read_text())
    lines = []
    for name in names:
        row = row_of(folder, name, original, options.threads, earlier)
        lines.append(row | (speed_of(seconds[name]) if seconds else {}))
        print(".", end="", flush=True)
    print()
    print_table(lines)
    if options.json and seconds:
        write_json(lines, options.json, options.threads)


if __name__ == "__main__":
    main()
