"""SmolLM2 in ONNX Runtime, float32 and dynamically quantised, for `decode.py`: its CPU provider has no bfloat16.

Keys and values of every layer are inputs and outputs of the graph. It is exported once, which takes a minute.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

KINDS = {"ONNX Runtime fp32": "onnx-fp32", "ONNX Runtime int8 dynamic": "onnx-int8"}


class Stepped(nn.Module):
    """A causal language model whose cache is a list of tensors [1, heads, t, d]: keys and values, layer by layer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        logits = self.model(input_ids=ids, cache=cache, use_cache=True).logits
        return logits, [part for layer in cache.layers for part in (layer.keys, layer.values)]


def export_decoder(model: nn.Module, folder: Path) -> None:
    """Write the two variants, unless they are there."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = model.float().eval()
    plain, small = (folder / name / "model.onnx" for name in KINDS.values())
    if small.exists():
        return
    config = model.config
    heads, d = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    past = [torch.zeros(1, heads, 5, d) for _ in range(2 * config.num_hidden_layers)]
    length, before = torch.export.Dim("length"), torch.export.Dim("before")
    plain.parent.mkdir(parents=True, exist_ok=True)
    small.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        Stepped(model).eval(),
        (torch.ones(1, 3, dtype=torch.int64), past),
        str(plain),
        dynamo=True,
        external_data=True,
        dynamic_shapes={"ids": {1: length}, "past": [{2: before}] * len(past)},
    )
    quantize_dynamic(plain, small, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True)


class Onnx:
    """A contestant of `decode.py`."""

    def __init__(self, file: Path, threads: int, short: int, long: int):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # else it slows whoever is next
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.bytes = sum(f.stat().st_size for f in file.parent.iterdir())
        self.short, self.long = short, long
        self.names = [i.name for i in self.session.get_inputs()]
        self.shape = self.session.get_inputs()[1].shape

    def _empty(self) -> list:
        heads, d = self.shape[1], self.shape[3]
        return [np.zeros((1, heads, 0, d), np.float32) for _ in self.names[1:]]

    def _run(self, ids: list[int], past: list) -> np.ndarray:
        given = dict(zip(self.names, [np.array([ids], np.int64), *past], strict=True))
        logits, *self.past = self.session.run(None, given)
        return logits[0]

    def prompt(self, ids: list[int]) -> None:
        self.token = int(self._run(ids, self._empty())[-1].argmax())

    def step(self) -> None:
        if self.past[0].shape[2] >= self.long:
            self.past = [part[:, :, : self.short] for part in self.past]
        self.token = int(self._run([self.token], self.past)[-1].argmax())

    def logits(self, ids: list[int]) -> Tensor:
        return torch.from_numpy(self._run(ids, self._empty()))
