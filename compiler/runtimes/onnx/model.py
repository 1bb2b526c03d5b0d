"""A folder of ONNX opened: ONNX Runtime at work in it, with the calls that models of transformers have."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.checkpoints.generation_config import read_generation_config
from ..padded import SEQUENCES, PaddedModel, PaddedRows
from .checking import ENCODER, FEATURES, FILE, OnnxFile, graphs_in, load_initializers, read_checked_onnx
from .refusal import rejected_onnx
from .session import Session

_UNBOUND = 1 << 20  # positions of a model that states no limit


class OnnxModule(nn.Module):
    """Anything else by ONNX Runtime: takes its inputs by name or in order; the first result."""

    def __init__(self, session: Session, tensors: dict[str, Tensor], facts: dict[str, Any]):
        super().__init__()
        self._session, self.facts, self.training = session, facts, False
        self.n_params: int | None = facts.get("params")
        self.stored_bytes: int | None = None
        self.weights = nn.Module()
        for name, tensor in tensors.items():
            self.weights.register_buffer(name.replace(".", "/"), tensor)

    def forward(self, *args: Tensor, **inputs: Tensor) -> Tensor:
        names = list(self._session.shapes)
        inputs = {**dict(zip(names, args, strict=False)), **inputs}
        if "input_ids" in inputs:
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            inputs.setdefault("position_ids", (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0))
        detached = {n: inputs[n].detach() for n in names}
        plain = {
            n: (x.float() if x.is_floating_point() else x).numpy() for n, x in detached.items()
        }  # numpy has no halves
        return torch.from_numpy(self._session.run(plain)[0])

    def train(self, mode: bool = True) -> "OnnxModule":
        assert not mode, "a graph of ONNX has no training mode"
        return self


def open_onnx(folder: Path, threads: int | None = None) -> nn.Module:
    """The model of a folder that the target `onnx` wrote. Raises Reject (refused-onnx)."""
    if len(graphs_in(folder)) > 1:
        from .seq2seq import open_seq2seq
        from .speech_seq2seq import open_hearing

        is_speech = FEATURES in read_checked_onnx(folder, ENCODER).inputs
        return (open_hearing if is_speech else open_seq2seq)(folder, threads)
    stored = read_checked_onnx(folder)
    tensors = load_initializers(folder, stored)  # first: kernels may read weights by the shapes that they state
    session = Session(folder / FILE, stored, threads)
    if not stored.facts["decodes"]:
        return OnnxModule(session, tensors, stored.facts)
    plan = _vocabulary_and_context(folder, session, stored)
    model = PaddedModel(
        PaddedRows(session, plan), plan, tensors, stored.facts, SEQUENCES, read_generation_config(folder)
    )
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def _vocabulary_and_context(folder: Path, session: Session, graph_file: OnnxFile) -> dict[str, int]:
    """Sizes of the vocabulary and of the context."""
    shape = session.results.get("logits", ())
    past = all(len(session.shapes[n]) == 4 and type(session.shapes[n][1]) is int for n in session.past)
    if len(shape) != 3 or type(shape[2]) is not int or not session.past or not past:
        raise rejected_onnx(f"{folder / FILE} is no decoder with keys and values", help="compile it again").rejection()
    return {"vocabulary": shape[2], "context": graph_file.facts["context"] or _UNBOUND}
