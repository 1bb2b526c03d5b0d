"""Print tokens a second, time to the first token, memory and bytes of Llama 3.2 1B's shapes in effc, torch and llama.cpp.

    python -m bench.llama_1b FOLDER [--threads 2] [--rounds 5] [--prompt-rounds 3] [--only NAME ...] [--json FILE]

Weights are random (giant.py), so nothing here is about quality; rows of 2,048 are what K-quants take whole. Sparse formats
have magnitude masks on the projections, the head is dense. Each contender has a process of its own; they take turns of 16
tokens, greedily from contexts of 64 to 128, then of a prompt of 512 tokens, with real-time priority where the system
allows it. llama.cpp's files are of its own quantiser, from float16. `--json` adds rows to those of an earlier run, which
took their turns apart; FOLDER keeps what is written (17 GB). Memory is the largest resident set of the process, mapped
weights and Python with it, behind a prompt of 512 tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import rivals
from bench.decode import peak

OWN = {  # numbers of linear layers, share of zeros in the projections, their kernel
    "effc bf16": ("bf16", 0.0, ""),
    "effc bf16, 50% zeros": ("bf16", 0.5, "sparse_linear"),
    "effc bf16, 70% zeros": ("bf16", 0.7, "sparse_linear"),
    "effc int8": ("int8", 0.0, ""),
    "effc int8, int16 inputs": ("int8_int16", 0.0, ""),
    "effc int8, 50% zeros": ("int8", 0.5, "sparse_linear_int8"),
    "effc int8, 70% zeros": ("int8", 0.7, "sparse_linear_int8"),
    "effc int4": ("int4", 0.0, ""),
}
LLAMA = {f"llama.cpp {kind.lower()}": kind for kind in ("F16", "Q8_0", "Q4_K_M", "Q4_0")}
TORCH = "torch bf16"
NAMES = (*OWN, TORCH, *LLAMA)
LIBRARIES = ("llama_cpp_python", "torch", "transformers", "effc")
REST = 0.03  # seconds before a turn: threads of the one before spin for some milliseconds


def base(folder: Path) -> Path:
    from bench.giant import write_random_checkpoint

    if not (folder / "base").exists():
        write_random_checkpoint("llama-3.2-1b", folder / "base")
    return folder / "base"


def files_of(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "-").replace(",", "").replace("%", "")


def load(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(base(folder), dtype=torch.bfloat16).eval()


def write_own(folder: Path, name: str) -> None:
    from effc.compiler.ir.capture.capture import capture
    from effc.compiler.ir.layers.linear import KernelLinear
    from effc.compiler.runtimes.native import plan_files
    from effc.compiler.runtimes.native.linears import NumberFormats
    from effc.compiler.runtimes.native.reader import Reader
    from effc.compiler.transforms.search import masks

    from bench.decoders import projections

    weights, zeros, kernel = OWN[name]
    model = load(folder)
    for path, module in projections(model) if kernel else []:
        module.weight.data *= masks.keep_mask(module.weight.detach().float().abs(), zeros, "any", "row")
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, KernelLinear.of(module, kernel))
    facts = {"class": "bench", "model_type": "llama", "params": 0}
    target = files_of(folder, name)
    target.mkdir()
    plan_files.write_plan(Reader(capture(model), NumberFormats(weights)).build_plan(), target, facts)


def write_gguf_file(folder: Path, name: str) -> None:
    import llama_cpp as api
    from effc.compiler.inputs.sources.zoo import zoo_folders_by_name
    from effc.compiler.runtimes.gguf.writing import write_gguf_and_notes
    from transformers import AutoTokenizer

    from bench.decoders import silent_llama

    whole, target = files_of(folder, "llama.cpp f16"), files_of(folder, name)
    target.mkdir()
    if name == "llama.cpp f16":  # of any tokenizer: no text is read
        write_gguf_and_notes(
            load(folder), whole, "f16", AutoTokenizer.from_pretrained(zoo_folders_by_name()["tiny-llama"])
        )
        return
    options = api.llama_model_quantize_default_params()
    options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{LLAMA[name]}")
    paths = [str(part / "model.gguf").encode() for part in (whole, target)]
    with silent_llama():
        status = api.llama_model_quantize(*paths, options)
    assert status == 0, f"no {name} file"


def write(folder: Path, name: str) -> None:
    """Files that a contender opens; torch opens the checkpoint."""
    if name == TORCH or files_of(folder, name).exists():
        return
    (write_own if name in OWN else write_gguf_file)(folder, name)


def bytes_of(folder: Path, name: str) -> int:
    where = base(folder) if name == TORCH else files_of(folder, name)
    return sum(file.stat().st_size for file in where.iterdir() if file.suffix in (".bin", ".gguf", ".safetensors"))


def open_contender(folder: Path, name: str, threads: int) -> Any:
    from bench.decoders import Llama, Own, Torch, silent_llama

    if name == TORCH:
        return Torch(load(folder), 0)
    if name in OWN:
        return Own(files_of(folder, name), threads)
    with silent_llama():
        return Llama(files_of(folder, name) / "model.gguf", threads)


def answer_stdin_commands(folder: Path, name: str, threads: int) -> None:
    """Answer `decode` with seconds a token and `prompt` with seconds."""
    from effc.compiler.transforms.lowering.racing import try_set_real_time_priority

    from bench.frontier import seconds_per_token_or_prompt

    torch.set_num_threads(threads)
    ids = torch.randint(1000, (rivals.PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    started = time.perf_counter()
    contender = open_contender(folder, name, threads)
    opened = time.perf_counter() - started
    contender.prompt(ids)
    contender.prompt(ids[:64])
    print(json.dumps({"open_s": round(opened, 2), "MiB": peak() >> 20}), flush=True)
    for line in sys.stdin:
        raised = try_set_real_time_priority(True)
        print(seconds_per_token_or_prompt(contender, line.strip(), ids), flush=True)
        if raised:
            try_set_real_time_priority(False)


class Contender:
    def __init__(self, folder: Path, name: str, threads: int):
        command = [sys.executable, "-m", "bench.llama_1b", str(folder), "--serve", name, "--threads", str(threads)]
        self.name, self.child = name, subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        self.facts, self.seconds = self.answer(), {"decode": [], "prompt": []}

    def answer(self) -> Any:
        for line in self.child.stdout:
            if line[0] in "{0123456789":  # libraries print banners
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with {self.child.wait()}")

    def turn(self, verb: str) -> None:
        time.sleep(REST)
        self.child.stdin.write(verb + "\n")
        self.child.stdin.flush()
        self.seconds[verb].append(self.answer())

    def row(self, folder: Path) -> dict:
        self.child.stdin.close()
        self.child.wait()
        tokens = [1 / seconds for seconds in self.seconds["decode"]]
        engine, _, label = self.name.partition(" ")
        return {
            "engine": engine,
            "label": label,
            "MB": round(bytes_of(folder, self.name) / 1e6),
            "tokens_s": round(statistics.median(tokens), 1),
            "range": [round(min(tokens), 1), round(max(tokens), 1)],
            "prompt_ms": round(1e3 * statistics.median(self.seconds["prompt"])),
            **self.facts,
        }


def race(folder: Path, names: list[str], threads: int, rounds: dict[str, int]) -> list[dict]:
    contenders = [Contender(folder, name, threads) for name in names]
    for verb, count in rounds.items():
        for number in range(count):
            for contender in contenders if number % 2 else contenders[::-1]:
                contender.turn(verb)
    return [contender.row(folder) for contender in contenders]


def main() -> None:
    from effc.compiler.core.fingerprint import machine_facts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, number in (("threads", 2), ("rounds", 5), ("prompt-rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--write", choices=NAMES, help="write what a contender opens, and end")
    chosen = parser.parse_args()
    if chosen.serve:
        return answer_stdin_commands(chosen.folder, chosen.serve, chosen.threads)
    if chosen.write:
        return write(chosen.folder, chosen.write)
    base(chosen.folder)
    for name in chosen.only:
        subprocess.run([sys.executable, "-m", "bench.llama_1b", str(chosen.folder), "--write", name], check=True)
    rows = race(chosen.folder, chosen.only, chosen.threads, {"decode": chosen.rounds, "prompt": chosen.prompt_rounds})
    for row in rows:
        print(json.dumps(row))
    if chosen.json:
        kept = json.loads(chosen.json.read_text("utf-8"))["rows"] if chosen.json.exists() else []
        again = {(row["engine"], row["label"]) for row in rows}
        measured = {
            "date": date.today().isoformat(),
            "machine": machine_facts(),
            "versions": {name: metadata.version(name) for name in LIBRARIES},
            "rounds": [chosen.rounds, chosen.prompt_rounds],
            "rows": [row for row in kept if (row["engine"], row["label"]) not in again] + rows,
        }
        chosen.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
