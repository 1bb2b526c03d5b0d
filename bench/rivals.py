"""Other engines' contestants in frontier.py's race: OpenVINO GenAI, ONNX Runtime GenAI and torchao.

    PYTHON -m bench.rivals write NAME FOLDER OUT            NAME's files, made by its own tools, in the new folder OUT
    PYTHON -m bench.rivals serve NAME FOLDER OUT THREADS    answers `decode`, `prompt`, `score TEXT`, as frontier.py's do

PYTHON is of an environment of their own, which frontier.py finds in the variable RIVALS_PYTHON:

    pip install torch torchao optimum-intel nncf openvino-genai openvino-tokenizers onnxruntime-genai onnx-ir

FOLDER is frontier.py's: its `base` is the model, its `rows.json` token ids by
text, of which `calib` are those that effc's own points are calibrated on. Nothing of effc is imported.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bench import text_quality

STEPS = 16  # tokens of a turn
CONTEXTS = (64, 80, 96, 112)  # tokens in front of a turn, one after the other, as the others decode from 64 to 128
PROMPT = 512  # tokens whose first answer is timed

Rows = list[list[int]]


class Contestant(Protocol):
    def decode(self, context: list[int]) -> float:
        """Seconds a token of STEPS greedy tokens behind `context`, without the first one."""

    def prompt(self, ids: list[int]) -> float:
        """Seconds until the first token behind `ids`."""

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Shape `(len(ids), vocabulary)`."""


def row_of(ids: list[int]) -> dict[str, np.ndarray]:
    row = np.array([ids], dtype=np.int64)
    return {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]}


class OpenVino:
    """GenAI's own pipeline at its defaults for CPUs; logits by the same file in OpenVINO's runtime."""

    def __init__(self, folder: Path, threads: int):
        import openvino
        import openvino_genai

        self.folder, self.options = folder, {"INFERENCE_NUM_THREADS": threads}
        self.scorer: Any = None
        self.pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **self.options)
        self.genai, self.openvino = openvino_genai, openvino

    def generate(self, ids: list[int], tokens: int) -> Any:
        row = row_of(ids)
        inputs = self.genai.TokenizedInputs(*(self.openvino.Tensor(row[n]) for n in ("input_ids", "attention_mask")))
        config = self.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        return self.pipeline.generate(inputs, config).perf_metrics

    def decode(self, context: list[int]) -> float:
        return self.generate(context, STEPS + 1).get_tpot().mean / 1000

    def prompt(self, ids: list[int]) -> float:
        return self.generate(ids, 1).get_ttft().mean / 1000

    def logits(self, ids: list[int]) -> torch.Tensor:
        if self.scorer is None:
            model = self.openvino.Core().compile_model(str(self.folder / "openvino_model.xml"), "CPU", self.options)
            self.scorer = model.create_infer_request()
        self.scorer.reset_state()
        self.scorer.infer(row_of(ids) | {"beam_idx": np.zeros(1, np.int32)})
        return torch.from_numpy(self.scorer.get_tensor("logits").data[0].copy())


class OnnxRuntime:
    """GenAI's generator; logits by the same file in ONNX Runtime."""

    def __init__(self, folder: Path, threads: int):
        import onnxruntime_genai

        config = json.loads((folder / "genai_config.json").read_text())
        config["model"]["decoder"]["session_options"] |= {"intra_op_num_threads": threads}
        (folder / "genai_config.json").write_text(json.dumps(config, indent=1))
        self.config, self.folder, self.threads = config["model"], folder, threads
        self.genai, self.model = onnxruntime_genai, onnxruntime_genai.Model(str(folder))
        self.scorer: Any = None

    def generator(self, ids: list[int]) -> Any:
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=1280, do_sample=False, min_length=1280)
        generator = self.genai.Generator(self.model, params)
        if ids:
            generator.append_tokens(ids)
        return generator

    def decode(self, context: list[int]) -> float:
        generator = self.generator(context)
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(STEPS):
            generator.generate_next_token()
        return (time.perf_counter() - started) / STEPS

    def prompt(self, ids: list[int]) -> float:
        generator = self.generator([])
        started = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        return time.perf_counter() - started

    def logits(self, ids: list[int]) -> torch.Tensor:
        import onnxruntime

        if self.scorer is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            file = str(self.folder / self.config["decoder"]["filename"])
            self.scorer = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        feed, decoder = dict(row_of(ids)), self.config["decoder"]
        heads, width = decoder["num_key_value_heads"], decoder["head_size"]
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        for value in self.scorer.get_inputs():
            if value.name.startswith("past"):
                feed[value.name] = np.zeros((1, heads, 0, width), types[value.type])
        names = {value.name for value in self.scorer.get_inputs()}
        (logits,) = self.scorer.run(["logits"], {name: value for name, value in feed.items() if name in names})
        return torch.from_numpy(logits[0])


class TorchAo:
    """Weights quantised by torchao as the model opens, in transformers with a static cache under `torch.compile`."""

    def __init__(self, folder: Path, threads: int):
        import torchao.quantization as ao
        from transformers import AutoModelForCausalLM, StaticCache

        torch.set_num_threads(threads)
        self.cache = StaticCache
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        form = (folder / "torchao").read_text()
        if form != "bf16":
            if model.config.tie_word_embeddings:  # a table of its own stays as it is; the head is a linear layer
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            ao.quantize_(model, getattr(ao, form)())
        self.model = model
        self.compiled = torch.compile(model.forward, mode="max-autotune-no-cudagraphs", dynamic=False)

    def token(self, call: Any, ids: list[int], cache: Any, start: int) -> int:
        positions = torch.arange(start, start + len(ids))[None]
        options = {"position_ids": positions, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        with torch.inference_mode():
            return int(call(input_ids=torch.tensor([ids]), **options).logits[0, -1].argmax())

    def decode(self, context: list[int]) -> float:
        cache = self.cache(config=self.model.config, max_cache_len=CONTEXTS[-1] + 2 * STEPS)
        token = self.token(self.model, context, cache, 0)
        token = self.token(self.compiled, [token], cache, len(context))
        started = time.perf_counter()
        for index in range(1, STEPS + 1):
            token = self.token(self.compiled, [token], cache, len(context) + index)
        return (time.perf_counter() - started) / STEPS

    def prompt(self, ids: list[int]) -> float:
        cache = self.cache(config=self.model.config, max_cache_len=PROMPT)
        started = time.perf_counter()
        self.token(self.compiled, ids, cache, 0)
        return time.perf_counter() - started

    def logits(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids])).logits[0]


def write_openvino(model: Path, rows: Rows, out: Path, bits: int, calibrated: bool) -> None:
    import nncf
    import openvino
    from optimum.intel import OVModelForCausalLM

    whole = OVModelForCausalLM.from_pretrained(model, export=True, compile=False, load_in_8bit=False)
    if bits == 8:
        graph = nncf.compress_weights(whole.model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:

        def feed(ids: list[int]) -> dict[str, Any]:
            return row_of(ids) | {"beam_idx": np.zeros(1, np.int32)}

        calibration = {"dataset": nncf.Dataset(rows, feed), "awq": True, "scale_estimation": True} if calibrated else {}
        mode = nncf.CompressWeightsMode.INT4_ASYM
        graph = nncf.compress_weights(whole.model, mode=mode, group_size=64, ratio=1.0, **calibration)
    out.mkdir()
    openvino.save_model(graph, out / "openvino_model.xml")
    subprocess.run(["convert_tokenizer", str(model), "-o", str(out), "--with-detokenizer"], check=True)
    for file in ("config.json", "generation_config.json"):
        (out / file).write_bytes((model / file).read_bytes())


def write_onnx(model: Path, out: Path, precision: str, algorithm: str) -> None:
    options = ["accuracy_level=4", "block_size=32", "is_symmetric=false", f"algo_config={algorithm}"]
    builder = f"-m onnxruntime_genai.models.builder -p {precision} -e cpu".split()
    folders = ["-i", str(model), "-o", str(out), "-c", str(out / "cache")]
    subprocess.run([sys.executable, *builder, *folders, "--extra_options", *options], check=True)


def write_torchao(model: Path, out: Path, form: str) -> None:
    out.mkdir()
    for file in model.iterdir():
        (out / file.name).symlink_to(file)
    (out / "torchao").write_text(form)


RIVALS: dict[str, tuple[type, tuple[Any, ...]]] = {
    "OpenVINO int8": (OpenVino, (8, False)),
    "OpenVINO int4": (OpenVino, (4, False)),
    "OpenVINO int4, awq and scales": (OpenVino, (4, True)),
    "ONNX Runtime int8": (OnnxRuntime, ("int8", "rtn")),
    "ONNX Runtime int4": (OnnxRuntime, ("int4", "rtn")),
    "ONNX Runtime int4, k_quant": (OnnxRuntime, ("int4", "k_quant")),
    "ONNX Runtime int4, k_quant_mixed": (OnnxRuntime, ("int4", "k_quant_mixed")),
    "torchao bf16": (TorchAo, ("bf16",)),
    "torchao int8": (TorchAo, ("Int8WeightOnlyConfig",)),
    "torchao int8, int8 inputs": (TorchAo, ("Int8DynamicActivationInt8WeightConfig",)),
}


def write_rival_model(name: str, folder: Path, out: Path) -> None:
    engine, options = RIVALS[name]
    if engine is OpenVino:
        write_openvino(folder / "base", json.loads((folder / "rows.json").read_text())["calib"], out, *options)
    elif engine is OnnxRuntime:
        write_onnx(folder / "base", out, *options)
    else:
        write_torchao(folder / "base", out, *options)


def set_real_time_priority(enabled: bool) -> None:
    """All threads of this process, where the system allows it, as effc's and llama.cpp's turns have it."""
    policy, parameter = (os.SCHED_FIFO, os.sched_param(1)) if enabled else (os.SCHED_OTHER, os.sched_param(0))
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(int(thread), policy, parameter)


def print_decode_seconds_per_stdin_line(name: str, folder: Path, out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    rows = json.loads((folder / "rows.json").read_text())
    contestant = RIVALS[name][0](out, threads)
    ids = [token for row in rows["kjv"] for token in row]
    contestant.decode(ids[: CONTEXTS[0]])
    contestant.prompt(ids[:PROMPT])
    print("ready", flush=True)
    for turn, line in enumerate(sys.stdin):
        verb, _, text = line.strip().partition(" ")
        if verb == "score":
            print(json.dumps(text_quality.score(folder, text, contestant.logits)), flush=True)
            continue
        set_real_time_priority(True)
        if verb == "prompt":
            seconds = contestant.prompt(ids[turn : turn + PROMPT])  # another one each time: OpenVINO keeps prefixes
        else:
            seconds = contestant.decode(ids[: CONTEXTS[turn % len(CONTEXTS)]])
        set_real_time_priority(False)
        print(seconds, flush=True)


def main(verb: str, name: str, folder: str, out: str, threads: str = "") -> None:
    if verb == "write":
        write_rival_model(name, Path(folder), Path(out))
    else:
        print_decode_seconds_per_stdin_line(name, Path(folder), Path(out), int(threads))


if __name__ == "__main__":
    main(*sys.argv[1:])
