"""A folder of ONNX opened: ONNX Runtime at work in it, with the calls that models of transformers have."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...dsl.diagnostics import Reject
from ..checkpoints.generation import read_generation
from ..native.padded import SEQUENCES, PaddedModel, PaddedRows
from ..report.broken import first_line
from .checking import DATA, FILE, Stored, check, weights
from .refusal import refused_onnx

_UNBOUND = 1 << 20  # positions of a model that states no limit


class Session:
    """A graph that ONNX Runtime runs, with torch's tensors."""

    def __init__(self, path: Path, stored: Stored, threads: int | None):
        """`path` is what messages name; what runs are the bytes that were checked."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads or torch.get_num_threads(), 1
        options.log_severity_level = 4
        if len(stored.data):
            options.add_external_initializers_from_files_in_memory([DATA], [stored.data], [len(stored.data)])
        try:
            self._session = ort.InferenceSession(stored.graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors are of many kinds without a common one
            raise Reject(
                refused_onnx(f"{path} is not run by ONNX Runtime: {first_line(error)}", help="compile it again")
            ) from error
        self.shapes = {i.name: i.shape for i in self._session.get_inputs()}
        self.results = {o.name: o.shape for o in self._session.get_outputs()}
        self.past = [name for name in self.shapes if name.startswith("past_key_values.")]

    def run(self, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(None, {name: given[name] for name in self.shapes})

    def step(self, ids: Tensor, mask: Tensor, past: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Logits [b, t, vocabulary], then keys and values; mask [b, past + t] has zeros before what a row lacks."""
        empty = [np.zeros((len(ids), self.shapes[n][1], 0, self.shapes[n][3]), np.float32) for n in self.past]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        return self.run({**given, **dict(zip(self.past, past or empty, strict=True))})


class OnnxModule(nn.Module):
    """Anything else by ONNX Runtime: takes its inputs by name or in order; the first result."""

    def __init__(self, session: Session, held: dict[str, Tensor], facts: dict[str, Any]):
        super().__init__()
        self._session, self.facts, self.training = session, facts, False
        self.weights = nn.Module()
        for name, tensor in held.items():
            self.weights.register_buffer(name.replace(".", "/"), tensor)

    def forward(self, *args: Tensor, **given: Tensor) -> Tensor:
        names = list(self._session.shapes)
        given = {**dict(zip(names, args, strict=False)), **given}
        if "input_ids" in given:
            given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
            given.setdefault("position_ids", (given["attention_mask"].cumsum(-1) - 1).clamp(min=0))
        return torch.from_numpy(self._session.run({n: given[n].detach().numpy() for n in names})[0])

    def train(self, mode: bool = True) -> "OnnxModule":
        assert not mode, "a graph of ONNX has no training mode"
        return self


def open_onnx(folder: Path, threads: int | None = None) -> nn.Module:
    """The model of a folder that the target `onnx` wrote. Raises Reject (refused-onnx)."""
    stored = check(folder)
    session, held = Session(folder / FILE, stored, threads), weights(folder, stored)
    if not stored.facts["decodes"]:
        return OnnxModule(session, held, stored.facts)
    plan = _plan(folder, session, stored)
    model = PaddedModel(PaddedRows(session, plan), plan, held, stored.facts, SEQUENCES, read_generation(folder))
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def _plan(folder: Path, session: Session, stored: Stored) -> dict[str, int]:
    """How many tokens it knows, and how many positions."""
    shape = session.results.get("logits", ())
    past = all(len(session.shapes[n]) == 4 and type(session.shapes[n][1]) is int for n in session.past)
    if len(shape) != 3 or type(shape[2]) is not int or not session.past or not past:
        raise Reject(refused_onnx(f"{folder / FILE} is no decoder with keys and values", help="compile it again"))
    return {"vocabulary": shape[2], "context": stored.facts["context"] or _UNBOUND}
