"""The native engine on the shape of SmolLM2-135M: tokens per second, where the time goes, how far the memory is.

    python -m bench.engine [--threads 2] [--context 64] [--seconds 0.5] [--llama FOLDER]

Weights are random, since speed depends on their number, format and sparsity alone; for quality see the report
of a compiled model. Contenders of a table take turns, each for a burst, since all of them have threads that
wait a while for the next call; with real-time priority where the system allows it. A sample in which a thread
was pre-empted is thrown away. `read` reads as many bytes as a token
needs and does nothing with them: the memory bound. With --llama, a folder where SmolLM2 lies as GGUF files,
and `llama-cpp-python` installed, llama.cpp takes its turns too.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from effc.compiler.transforms.lowering.contenders import memory_read_contender
from effc.compiler.transforms.lowering.racing import Contender, involuntary_switches, try_set_real_time_priority
from effc.kernels import levels
from effc.kernels.engine import Engine
from effc.kernels.ops import LINEARS

FORMATS = {
    "int8 50%": ("sparse_linear_int8", 0.5),
    "int8": ("dense_linear_int8", 1.0),
    "bf16 50%": ("sparse_linear", 0.5),
    "bf16": ("dense_linear", 1.0),
}


@dataclass(frozen=True)
class Sizes:
    """Of a Llama whose embedding is tied to its head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    head_dim: int = 64
    context: int = 8192


SMOLLM2_135M = Sizes(30, 576, 9, 3, 1536, 49152)
LLAMA_1B = Sizes(16, 2048, 32, 8, 8192, 128256)  # Llama 3.2


class Shape:
    """A plan of a Llama's shape and its weights."""

    def __init__(self, kernel: str, density: float, sizes: Sizes = SMOLLM2_135M):
        self.kernel, self.density, self.sizes, self.weights = kernel, density, sizes, {}
        self.generator = torch.Generator().manual_seed(0)
        self.plan: dict[str, Any] = {"version": 1, "context": sizes.context, "registers": [], "slots": [], "steps": []}
        self.ones = self.add("ones", torch.ones(sizes.hidden))
        self.frequencies = self.add("frequencies", 1 / 10000 ** torch.arange(0, 1, 2 / sizes.head_dim))

    def add(self, name: str, weight: torch.Tensor) -> str:
        self.weights[name] = weight
        return name

    def packed(self, n: int, k: int) -> str:
        weight = torch.randn(n, k, generator=self.generator) * k**-0.5
        if self.density < 1:
            weight *= torch.rand(n, k, generator=self.generator) < self.density
        return self.add(f"w{len(self.weights)}", LINEARS[self.kernel].pack(weight.bfloat16()))

    def step(self, op: str, width: int, **fields) -> int:
        self.plan["registers"].append(width)
        self.plan["logits"] = len(self.plan["registers"]) - 1
        self.plan["steps"].append({"op": op, "to": self.plan["logits"], **fields})
        return self.plan["logits"]

    def linear(self, x: int, n: int) -> int:
        return self.step("linear", n, x=x, weight=self.packed(n, self.plan["registers"][x]), bias=None)

    def norm(self, x: int) -> int:
        width = self.sizes.hidden
        return self.step("norm", width, x=x, kind="rms", weight=self.ones, bias=None, eps=1e-5, group=width)

    def append_rotary(self, x: int, heads: int) -> int:
        d = self.sizes.head_dim
        return self.step(
            "rotary",
            heads * d,
            x=x,
            heads=heads,
            head_dim=d,
            rotary_dim=d,
            start=0,
            scale=1.0,
            interleaved=False,
            inverse_frequencies=self.frequencies,
        )

    def layer(self, x: int) -> int:
        sizes, d = self.sizes, self.sizes.head_dim
        inner = self.norm(x)
        q, k, v = (self.linear(inner, heads * d) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads))
        self.plan["slots"].append({"kv_heads": sizes.kv_heads, "head_dim": d, "value_dim": d})
        seen = self.step(
            "attention",
            sizes.hidden,
            q=self.append_rotary(q, sizes.heads),
            k=self.append_rotary(k, sizes.kv_heads),
            v=v,
            heads=sizes.heads,
            slot=len(self.plan["slots"]) - 1,
            kv_heads=sizes.kv_heads,
            head_dim=d,
            value_dim=d,
            scale=d**-0.5,
            softcap=None,
            window=None,
            sinks=None,
        )
        x = self.step("add", sizes.hidden, x=x, y=self.linear(seen, sizes.hidden))
        inner = self.norm(x)
        gate = self.step("act", sizes.inner, x=self.linear(inner, sizes.inner), kind="silu")
        both = self.step("mul", sizes.inner, x=gate, y=self.linear(inner, sizes.inner))
        return self.step("add", sizes.hidden, x=x, y=self.linear(both, sizes.hidden))

    def whole(self) -> "Shape":
        head = self.packed(self.sizes.vocabulary, self.sizes.hidden)
        x = self.step("embedding", self.sizes.hidden, table=head)
        for _ in range(self.sizes.layers):
            x = self.layer(x)
        self.step("linear", self.sizes.vocabulary, x=self.norm(x), weight=head, bias=None)
        return self

    @property
    def bytes(self) -> int:
        return sum(w.numel() * w.element_size() for w in self.weights.values())


def decode_step(engine: Engine, context: int, rows: int = 1) -> Callable[[], None]:
    """A call that decodes one token of each sequence at nearly the same length every time."""
    for row in range(rows):
        engine.forget(row)
        engine.run([7] * context, [row] * context, [])

    def call() -> None:
        engine.run([7] * rows, range(rows))
        if engine.length(0) >= context + 32:
            for row in range(rows):
                engine.forget(row, context)

    return call


def prefill(engine: Engine, tokens: int) -> Callable[[], None]:
    def call() -> None:
        engine.forget(0)
        engine.run([7] * tokens, [0] * tokens, [tokens - 1])

    return call


def llama_cpp_calls(folder: Path, threads: int, context: int) -> dict[str, tuple]:
    """Name: (one token, a prompt of 256) of every GGUF file, through llama.cpp's own C API."""
    try:
        import llama_cpp
    except ImportError:
        print("llama.cpp: `llama-cpp-python` is not installed")
        return {}
    found = {}
    for path in sorted(folder.glob("*.gguf")):
        model = llama_cpp.Llama(
            str(path),
            n_ctx=512,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            logits_all=False,
        )

        def token(model=model) -> None:
            if model.n_tokens < context or model.n_tokens >= context + 32:
                model.reset()
                model.eval([7] * context)
            model.eval([7])

        def prompt(model=model) -> None:
            model.reset()
            model.eval([7] * 256)

        found[f"llama.cpp {path.stem.split('.')[-1].split('-')[-1]}"] = (token, prompt)
    return found


def run_burst(contender: Contender, seconds: float = 0.05) -> None:
    """Calls one after another; the first two find threads asleep and count as none."""
    call = contender.calls[0]
    try_set_real_time_priority(True)
    begun = time.perf_counter()
    call()
    call()
    while time.perf_counter() - begun < seconds:
        before, start = involuntary_switches(), time.perf_counter()
        call()
        took = time.perf_counter() - start
        (contender.times if involuntary_switches() == before else contender.thrown).append(took)
    try_set_real_time_priority(False)
    time.sleep(seconds)


def print_table(title: str, contenders: list[Contender], tokens: int, seconds: float) -> None:
    """One line of each contender; `seconds` are what each is called for."""
    bursts = max(3, round(seconds / 0.05))
    for turn in range(bursts):
        for c in contenders if turn % 2 else contenders[::-1]:
            run_burst(c, 0.05 if tokens < 100 else 0.5)
    print(f"\n{title}")
    for c in contenders:
        c.times = c.times or [float("nan")]
    bounds = {c.bytes: c.seconds for c in contenders if c.name.startswith("read")}
    for c in contenders:
        share = f"  {bounds[c.bytes] / c.seconds:5.2f} of the memory bound" if c.bytes in bounds else ""
        print(
            f"  {c.name:<18}{c.seconds * 1e3:8.2f} ms{tokens / c.seconds:9.0f} tokens/s{share}"
            f"   kept {len(c.times)}, thrown {len(c.thrown)}"
        )


def print_profile(name: str, engine: Engine, call, calls: int = 40) -> None:
    """Milliseconds per token of all threads together, over calls that no other process disturbed."""
    sums: dict[str, float] = {}
    kept = 0
    for _ in range(8 * calls):
        if kept == calls:
            break
        if kept % 10 == 0:
            try_set_real_time_priority(False)
            time.sleep(0.03)
            try_set_real_time_priority(True)
        engine.thread_seconds_by_work()
        before = involuntary_switches()
        call()
        if involuntary_switches() == before:
            kept += 1
            sums = {k: sums.get(k, 0) + v for k, v in engine.thread_seconds_by_work().items()}
    try_set_real_time_priority(False)
    engine.thread_seconds_by_work(False)
    whole = sum(sums.values()) or 1
    parts = "  ".join(f"{k} {v / max(1, kept) * 1e3:.3f} ({v / whole:.0%})" for k, v in sums.items())
    print(f"  {name:<10} thread-ms of a token: {parts}")


def main() -> None:
    options = argparse.ArgumentParser()
    for name, kind, default in (
        ("threads", int, 2),
        ("context", int, 64),
        ("seconds", float, 0.5),
        ("only", str, ""),
        ("llama", Path, None),
    ):
        options.add_argument(f"--{name}", type=kind, default=default)
    chosen = options.parse_args()
    names = [n for n in FORMATS if not chosen.only or n in chosen.only.split(",")]
    print(f"{levels.active_level_and_reason()}; {chosen.threads} threads; context {chosen.context}")
    shapes, engines = {}, {}
    for name in names:
        shapes[name] = Shape(*FORMATS[name]).whole()
        begun = time.perf_counter()
        engines[name] = Engine(shapes[name].plan, shapes[name].weights, chosen.threads, 8)
        print(f"  {name:<10} {shapes[name].bytes / 1e6:6.1f} MB, loaded in {time.perf_counter() - begun:.2f} s")
    others = llama_cpp_calls(chosen.llama, chosen.threads, chosen.context) if chosen.llama else {}
    for rows in (1, 4, 8):
        own = [Contender(n, [decode_step(engines[n], chosen.context, rows)], shapes[n].bytes) for n in names]
        reads = [memory_read_contender(shapes[n].bytes, chosen.threads) for n in names] if rows == 1 else []
        for n, read in zip(names, reads, strict=False):
            read.name = f"read {n}"
        theirs = [Contender(n, [calls[0]]) for n, calls in others.items()] if rows == 1 else []
        print_table(
            f"decode, {rows} sequences" if rows > 1 else "decode", [*own, *reads, *theirs], rows, chosen.seconds
        )
    own = [Contender(n, [prefill(engines[n], 256)]) for n in names]
    print_table("prefill 256", [*own, *(Contender(n, [c[1]]) for n, c in others.items())], 256, 2 * chosen.seconds)
    print("\nwhere the time goes")
    for name in names:
        print_profile(name, engines[name], decode_step(engines[name], chosen.context))


if __name__ == "__main__":
    main()
