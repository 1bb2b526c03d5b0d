"""A graph that ONNX Runtime runs."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...core.json_errors import first_line
from .checking import OnnxFile
from .refusal import rejected_onnx


class Session:
    """A graph that ONNX Runtime runs, with torch's tensors."""

    def __init__(self, path: Path, graph_file: OnnxFile, threads: int | None):
        """`path` is what messages name; what runs are the bytes that were checked."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads or torch.get_num_threads(), 1
        options.log_severity_level = 4
        if len(graph_file.data):
            options.add_external_initializers_from_files_in_memory(
                [graph_file.file], [graph_file.data], [len(graph_file.data)]
            )
        try:
            self._session = ort.InferenceSession(graph_file.graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors are of many kinds without a common one
            raise rejected_onnx(
                f"{path} is not run by ONNX Runtime: {first_line(error)}", help="compile it again"
            ).rejection() from error
        self.shapes = {i.name: i.shape for i in self._session.get_inputs()}
        self.results = {o.name: o.shape for o in self._session.get_outputs()}
        self.past = [name for name in self.shapes if name.startswith("past_key_values.")]

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(None, {name: inputs[name] for name in self.shapes})

    def step(self, ids: Tensor, mask: Tensor, past: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Logits [b, t, vocabulary], then keys and values; mask [b, past + t] has zeros before what a row lacks."""
        empty = [np.zeros((len(ids), self.shapes[n][1], 0, self.shapes[n][3]), np.float32) for n in self.past]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        return self.run({**inputs, **dict(zip(self.past, past or empty, strict=True))})
