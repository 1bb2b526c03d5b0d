"""A mixture of experts on the native engine: tokens per second against torch, llama.cpp and the bytes a token needs.

    python -m bench.mixtures [--threads 2] [--rounds 12] [--prompt 256] [--weights bf16 int8 int4]

Weights are random: a model of Qwen3-MoE's kind, 32 experts of which a token asks 4. Contenders take turns, a few tokens
each, and the medians of their turns are compared, since the machine may be busy. `read` reads as many bytes as a token
needs of the weights of its engine and does nothing with them: the memory bound. llama.cpp takes part where
llama-cpp-python is importable (built for this machine: `decode.py` says how), with the same weights, and has to
give the logits that torch gives.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.plan import weights_read_by_step as weights_of
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.transforms.lowering.contenders import memory_read_contender
from effc.kernels import levels
from effc.kernels.engine import Engine
from transformers import AutoConfig, AutoModelForCausalLM

CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
BURST = 4  # tokens of a turn
KINDS = ("bf16", "q8_0")  # of llama.cpp


def bytes_per_token(plan: dict, tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of weights that a token reads: of experts only those that it chose, of a table one row."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    counts = {step["to"]: step["count"] for step in plan["steps"] if step["op"] == "route"}
    total = 0.0
    for step in plan["steps"]:
        own = [sizes[name] for name in weights_of(step)]
        if step["op"] == "experts":
            total += sum(own) / len(step["weights"]) * counts[step["chosen"]]
        elif step["op"] not in ("embedding", "positions"):
            total += sum(own)
    return int(total)


def time_in_turns(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of a call of each, which take turns."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, call in contenders.items():
            for _ in range(BURST):
                begun = time.perf_counter()
                call()
                found[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[BURST:]) for name, times in found.items()}


def memory_read_call(n_bytes: int, threads: int) -> Callable[[], None]:
    """Reads as many bytes, others at every call."""
    calls = cycle(memory_read_contender(n_bytes, threads).calls)
    return lambda: next(calls)()


class Torch:
    """The model in bfloat16 with a cache, a token at a time."""

    def __init__(self, model: torch.nn.Module, prompt: torch.Tensor):
        self.model, self.prompt = model, prompt
        self.cache, self.next = self.read().cache, cycle(prompt[0].tolist())

    def read(self) -> Any:
        with torch.no_grad():
            return self.model(self.prompt, use_cache=True)

    def decode(self) -> None:
        with torch.no_grad():
            self.model(torch.tensor([[next(self.next)]]), cache=self.cache, use_cache=True)


class Llama:
    """llama.cpp with the same weights, a token at a time."""

    def __init__(self, model: torch.nn.Module, prompt: torch.Tensor, folder: Path, kind: str, threads: int):
        from bench import decoders, mixtures_gguf

        file = folder / f"{kind}.gguf"
        self.bytes = mixtures_gguf.write_gguf(model, file, kind)
        with decoders.silent_llama():
            self.own = decoders.Llama(file, threads)
        self.ids, self.next = prompt[0].tolist(), cycle(prompt[0].tolist())
        with torch.no_grad():
            wanted = model(prompt).logits[0].float()
        pairs = (x - x.mean(-1, keepdim=True) for x in (self.own.logits(self.ids), wanted))
        alike = float(torch.cosine_similarity(*pairs).median())
        print(f"llama.cpp {kind}: median cosine of its logits to torch's {alike:.4f}")
        assert alike > 0.9, "llama.cpp computes another model"
        self.read()

    def read(self) -> None:
        self.own.prompt(self.ids)

    def decode(self) -> None:
        self.own.feed([next(self.next)])


def main() -> None:
    options = argparse.ArgumentParser()
    for name, default in (("threads", 2), ("rounds", 12), ("prompt", 256)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--weights", nargs="*", default=["bf16", "int8"])  # int4 takes minutes to pack
    own = options.parse_args()
    torch.set_num_threads(own.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **CONFIG), dtype=torch.bfloat16).eval()
    count = sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, CONFIG["vocab_size"], (1, own.prompt))
    print(
        f"{count / 1e6:.0f}M parameters, {own.threads} threads, level {levels.active_level()}, torch {torch.__version__}"
    )
    program, theirs = capture(model), Torch(model, ids)
    decode, prefill, bytes_of = {"torch bf16": theirs.decode}, {"torch bf16": theirs.read}, {}
    engines = []
    for weights in own.weights:
        made = Reader(program, weights).build_plan()
        tensors = {name: entry.make() for name, entry in made.live_weight_entries().items()}
        plan = made.to_json()
        engine = Engine(plan, tensors, own.threads)
        engine.run(ids[0].tolist(), [0] * own.prompt, [])
        engines.append(engine)
        bytes_of[weights] = bytes_per_token(plan, tensors)

        def token(engine=engine, ids=cycle(ids[0].tolist())) -> None:
            engine.run([next(ids)], [0])

        def again(engine=engine) -> None:
            engine.forget(0)
            engine.run(ids[0].tolist(), [0] * own.prompt, [own.prompt - 1])

        decode |= {weights: token, f"read {weights}": memory_read_call(bytes_of[weights], own.threads)}
        prefill[weights] = again
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS if find_spec("llama_cpp") else ():
            llama, name = Llama(model, ids, Path(folder), kind, own.threads), f"llama.cpp {kind}"
            bytes_of[name] = llama.bytes
            decode |= {name: llama.decode, f"read {name}": memory_read_call(llama.bytes, own.threads)}
            prefill[name] = llama.read
            engines.append(llama)
        print_report(time_in_turns(decode, own.rounds), bytes_of)
        report_prompt(time_in_turns(prefill, max(2, own.rounds // 4)), own.prompt)


def report_prompt(times: dict[str, float], length: int) -> None:
    print(f"\na prompt of {length} tokens")
    for name, seconds in times.items():
        print(f"  {name:<18}{seconds * 1e3:9.1f} ms{length / seconds:9.0f} tokens/s")


def print_report(times: dict[str, float], bytes_of: dict[str, int]) -> None:
    print("\na token")
    for name, seconds in times.items():
        share = ""
        if name in bytes_of:
            share = f"{bytes_of[name] / 1e6:7.0f} MB, {times[f'read {name}'] / seconds:5.2f} of the memory bound"
            share += f", {times['torch bf16'] / seconds:5.1f} x torch"
        print(f"  {name:<18}{seconds * 1e3:8.2f} ms{1 / seconds:8.0f} tokens/s  {share}")


if __name__ == "__main__":
    main()
