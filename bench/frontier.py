"""Print tokens a second against held-out perplexity: SmolLM2 in this engine's formats and in llama.cpp's.

    python bench/frontier.py FOLDER [--threads 2] [--rounds 9] [--only NAME ...] [--json FILE] [--no-speed]

The model is that of smol.py, which no 4-bit format gets back. Each contender lives in a process of its own; they take
turns of 16 tokens, decoding greedily from contexts of 64 to 128, with real-time priority where the system allows it, so
that other work on the machine hardly counts. Perplexity is what each computes itself of `docs` and `kjv`, 8 rows of 256
tokens each. Sparse and pruned ones are trained for `--steps` steps; `bf16, trained` and `int8, trained` are the whole
model after as many, since training on text like `docs` and `kjv` helps by itself. llama.cpp takes part where `llama_cpp`
imports; its files are made by its own quantiser from float16. ik_llama.cpp reads the same files, where the environment's
`IK_LLAMA_BENCH` names the library that ik_llama.cc makes. FOLDER keeps what is done.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import smol
import torch

ROUND = "q = quantize.round(group: 32)"
PUBLISHED = "q = quantize.gptq(group: 32, data: calib, scales: range, order: given, sweeps: 0)"
GPTQ = "q = quantize.gptq(group: 32, data: calib)"
SCALE = "s = quantize.scale(group: 32, data: calib)"
EIGHT = "s = quantize.scale(bits: 8, group: 0, zero: middle, scales: range, inputs: int8, data: calib)"
EIGHT_OF_WEIGHTS = "s = quantize.scale(bits: 8, group: 0, zero: middle, scales: range, data: calib)"
ZEROS = "sps = sparsify.admm(sparsity: {}% of weights, data: calib)"
THIN = "cut = prune.multi(remove: 10% of params, group: 128, score: perplexity(calib), estimate: taylor, together: 8)"
HEAL = "fit = tune.heal(data: train, method: full, steps: {0}, batch: 4, lr: 5e-5, save: 20)"
NATIVE_VARIANTS = {  # name -> steps, numbers of linear layers, kernel of the projections
    "own bf16": ((), "bf16", ""),
    "own int8": ((), "int8", ""),
    "own int8, scaled": ((EIGHT,), "int8", ""),
    "own int8, int16 inputs": ((), "int8_int16", ""),
    "own int8, int16 inputs, scaled": ((EIGHT_OF_WEIGHTS,), "int8_int16", ""),
    "own int4, rounded": ((ROUND,), "int4", ""),
    "own int4, published gptq": ((PUBLISHED,), "int4", ""),
    "own int4, gptq": ((GPTQ,), "int4", ""),
    "own int4, scaled, rounded": ((SCALE, ROUND), "int4", ""),
    "own int4, scaled, gptq": ((SCALE, GPTQ), "int4", ""),
    "own bf16, trained": ((HEAL,), "bf16", ""),
    "own int8, trained": ((HEAL,), "int8", ""),
    "own int8, trained, scaled": ((HEAL, EIGHT), "int8", ""),
    "own int8, int16 inputs, trained": ((HEAL,), "int8_int16", ""),
    "own int8, 30% zeros, trained": ((ZEROS.format(30), HEAL), "int8", "sparse_linear_int8"),
    "own int8, 50% zeros, trained": ((ZEROS.format(50), HEAL), "int8", "sparse_linear_int8"),
    "own int8, 60% zeros, trained": ((ZEROS.format(60), HEAL), "int8", "sparse_linear_int8"),
    "own int8, pruned 10%, trained": ((THIN, HEAL), "int8", ""),
}
LLAMA = {f"llama.cpp {kind.lower()}": kind for kind in ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL")}
IMATRIX = {f"llama.cpp {kind}, imatrix": kind for kind in ("q5_k", "q4_k", "iq4_nl")}  # target `gguf`, data: calib
IK = {f"ik_{name}": name for name in LLAMA}  # reads the file of
STEPS = 16  # tokens of a turn
REST = 0.03  # seconds before a turn: threads of the one before spin for some milliseconds


def place_of(folder: Path, name: str) -> Path:
    name = IK.get(name, name)
    return folder / "frontier" / name.replace(" ", "-").replace(",", "").replace("%", "")


def write_native(folder: Path, name: str, steps: int) -> None:
    from effc.compiler.ir.layers.linear import KernelLinear
    from effc.compiler.runtimes.native import plan_files
    from effc.compiler.runtimes.native.emission import native_artifact_facts
    from effc.compiler.runtimes.native.linears import NumberFormats
    from effc.compiler.runtimes.native.reader import Reader

    made, weights, kernel = NATIVE_VARIANTS[name]
    words = "\n  ".join(made).format(steps)
    build = smol.build_of(folder, place_of(folder, name).name, words, model=smol.base(folder, "bfloat16"), seed=0)
    program = smol.finished(build)
    model = program.model
    for path, module in list(model.named_modules()) if kernel else []:
        if path.endswith("_proj"):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, KernelLinear.of(module, kernel))
    place = place_of(folder, name)
    place.mkdir(parents=True)
    program.changed()
    plan_files.write_plan(
        Reader(program, NumberFormats(weights, 32)).build_plan(), place, native_artifact_facts(model, weights)
    )


def write_llama_cpp_quant(folder: Path, name: str) -> None:
    """A file of one of llama.cpp's forms, by its own quantiser from float16."""
    import llama_cpp as api
    from decoders import silent_llama
    from effc.compiler.runtimes.gguf.writing import write_gguf

    whole = folder / "frontier" / "model.gguf"
    if not whole.exists():
        build = smol.build_of(folder, "frontier", "", model=smol.base(folder))
        write_gguf(build.ctx.origin.load(), whole.parent, "f16", build.ctx.tokenizer)
    place = place_of(folder, name)
    place.mkdir()
    options = api.llama_model_quantize_default_params()
    options.nthread = 1
    options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{LLAMA[name]}")
    with silent_llama():
        status = api.llama_model_quantize(str(whole).encode(), str(place / "model.gguf").encode(), options)
    assert status == 0, f"no {name} file"


def write_gguf_by_importance(folder: Path, name: str) -> None:
    """A file by llama.cpp's quantiser with an importance matrix of the rows that effc's points are calibrated on."""
    from effc.compiler.ir.capture.capture import capture
    from effc.compiler.runtimes.gguf.importance import importance_matrix
    from effc.compiler.runtimes.gguf.writing import write_gguf
    from effc.dsl.checker.values import DataRef

    ctx = smol.build_of(folder, "importance", "", model=smol.base(folder)).ctx
    program = capture(ctx.origin.load())
    place = place_of(folder, name)
    place.mkdir()
    importance = importance_matrix(program, ctx.rows(DataRef("calib")))
    write_gguf(program.model, place, IMATRIX[name], ctx.tokenizer, importance)


def bytes_of(folder: Path, name: str) -> int:
    return sum(file.stat().st_size for file in place_of(folder, name).glob("*") if file.suffix in (".gguf", ".bin"))


def serve(folder: Path, name: str, threads: int) -> None:
    """Answer lines of stdin: `decode` with seconds a token, `score FILE` with the nats of each token."""
    from decoders import Ik, Llama, Own, perplexity, silent_llama
    from effc.compiler.transforms.lowering.racing import set_real_time_priority

    torch.set_num_threads(threads)
    rows = json.loads((folder / "rows.json").read_text())
    if name in NATIVE_VARIANTS:
        contestant = Own(place_of(folder, name), threads)
    elif name in IK:
        contestant = Ik(place_of(folder, name) / "model.gguf", threads)
    else:
        with silent_llama():
            contestant = Llama(place_of(folder, name) / "model.gguf", threads)
    contestant.prompt(rows["docs"][0][:64])
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "decode":
            raised = set_real_time_priority(True)
            contestant.step()
            started = time.perf_counter()
            for _ in range(STEPS):
                contestant.step()
            found = (time.perf_counter() - started) / STEPS
            if raised:
                set_real_time_priority(False)
        else:
            found = perplexity(contestant, rows[line.split()[1]])
        print(found, flush=True)


class Contestant:
    def __init__(self, folder: Path, name: str, threads: int):
        command = [sys.executable, __file__, str(folder), "--serve", name, "--threads", str(threads)]
        self.name, self.child = name, subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        line = self.child.stdout.readline()
        assert line == "ready\n", f"{name} did not begin"

    def ask(self, line: str) -> float:
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        return float(self.child.stdout.readline())

    def end(self) -> None:
        self.child.stdin.close()
        self.child.wait()


def rows_of(folder: Path) -> None:
    from effc.dsl.checker.values import DataRef

    build = smol.build_of(folder, "frontier", "", model=smol.base(folder, "bfloat16"))
    rows = {name: build.ctx.rows(DataRef(name)).tolist() for name in smol.HELD_OUT}
    (folder / "rows.json").write_text(json.dumps(rows))


def race(folder: Path, names: list[str], threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a token of each, turn by turn."""
    players = [Contestant(folder, name, threads) for name in names]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for player in players:
            time.sleep(REST)
            found = player.ask("decode")
            if number:  # the first turn warms up
                seconds[player.name].append(found)
    for player in players:
        player.end()
    return seconds


def write_json(lines: list[dict], file: Path, threads: int) -> None:
    """Add rows of this race, with today's date, to those of other days."""
    from effc.compiler.core.fingerprint import machine_facts

    machine = "{cpu} ({isa}), {0} threads".format(threads, **machine_facts())
    today = date.today().isoformat()
    earlier = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in earlier if row["date"] != today] + [row | {"date": today} for row in lines]
    facts = {"model": "SmolLM2-135M-Instruct", "machine": machine, "script": "bench/frontier.py"}
    lines_of_rows = ",\n  ".join(map(json.dumps, rows))
    file.write_text(json.dumps(facts, indent=1)[:-2] + f',\n "rows": [\n  {lines_of_rows}\n ]\n}}\n')


def engine_and_label(name: str) -> tuple[str, str]:
    """The engine of a contestant, and its name without it."""
    if name in NATIVE_VARIANTS:
        return "effc", name.removeprefix("own ")
    engine, _, label = name.partition(" ")
    return engine, label


def main() -> None:
    from decoders import IK_LIBRARY
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=[*NATIVE_VARIANTS, *LLAMA, *IMATRIX, *IK])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--serve")
    asked = parser.parse_args()
    folder = asked.folder.resolve()
    if asked.serve:
        serve(folder, asked.serve, asked.threads)
        return
    torch.set_num_threads(1)
    print(", ".join(f"{k} {v}" for k, v in machine_facts().items()), flush=True)
    names = asked.only or [
        *NATIVE_VARIANTS,
        *((*LLAMA, *IMATRIX) if find_spec("llama_cpp") else ()),
        *(IK if IK_LIBRARY else ()),
    ]
    if not find_spec("llama_cpp"):
        print("llama.cpp: absent, `llama_cpp` does not import", flush=True)
    smol.write_rescaled(folder)
    if not (folder / "rows.json").exists():
        rows_of(folder)
    for name in names:
        if not place_of(folder, name).exists():
            if name in NATIVE_VARIANTS:
                write_native(folder, name, asked.steps)
            elif name in IMATRIX:
                write_gguf_by_importance(folder, name)
            else:
                write_llama_cpp_quant(folder, IK.get(name, name))
    run_benchmark(folder, names, asked)


def perplexities(folder: Path, name: str, threads: int) -> list[float]:
    """Perplexity of the held-out texts; kept beside what it is of."""
    kept = place_of(folder, name) / f"{'ik_' if name in IK else ''}perplexity.json"
    if not kept.exists():
        player = Contestant(folder, name, threads)
        found = [player.ask(f"score {text}") for text in smol.HELD_OUT]
        player.end()
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def run_benchmark(folder: Path, names: list[str], options: argparse.Namespace) -> None:
    known = {name: perplexities(folder, name, options.threads) for name in names}
    seconds = {} if options.no_speed else race(folder, names, options.threads, options.rounds)
    line = "{:<32}{:>8}{:>9}{:>9}{:>12}{:>20}{:>12}"
    print(line.format("", "MB", *smol.HELD_OUT, "tokens/s", "lowest..highest", "of bf16"), flush=True)
    lines = []
    for name in names:
        cells, turns = [f"{bytes_of(folder, name) / 1e6:.0f}", *(f"{p:.2f}" for p in known[name])], seconds.get(name)
        if turns:
            shares = [a / b for a, b in zip(seconds[names[0]], turns, strict=True)]
            rates = sorted(1 / s for s in turns)
            cells += [f"{statistics.median(rates):.0f}", f"{rates[0]:.0f}..{rates[-1]:.0f}"]
            cells.append(f"{statistics.median(shares):.2f}")
            speed = statistics.median(rates)
            engine, label = engine_and_label(name)
            texts = dict(zip(smol.HELD_OUT, known[name], strict=True))
            lines.append(
                {"engine": engine, "label": label, "MB": round(bytes_of(folder, name) / 1e6), **texts}
                | {"perplexity": math.prod(known[name]) ** 0.5, "tokens_s": speed, "range": [rates[0], rates[-1]]}
            )
        print(line.format(name, *cells, *[""] * (6 - len(cells))), flush=True)
    for theirs in (row for row in lines if row["engine"] != "effc"):
        better = [row for row in lines if row["engine"] == "effc" and row["perplexity"] <= theirs["perplexity"]]
        best = max(better, key=lambda row: row["tokens_s"], default=None)
        result = "none" if best is None else f"{best['label']}, {best['tokens_s'] / theirs['tokens_s']:.2f}x"
        print(f"no worse than {theirs['engine']} {theirs['label']}: {result} (goal 1.3x)", flush=True)
    if options.json and lines:
        write_json(lines, options.json, options.threads)


if __name__ == "__main__":
    main()
