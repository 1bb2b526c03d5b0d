"""Outputs of the original model on disk, so that later models are compared without its weights.

Kept are the inputs of the output embedding, in the model's own dtype, and the embedding's weight once per model:
that gives the original's logits bit for bit at a fraction of their size (SmolLM2: 1/43 of float16 logits).
Where the logits aren't such a product, the log-probabilities are kept in float16 instead: measured on SmolLM2,
that moves a divergence of 2.8e-3 nats by 3e-7 (bfloat16: 2e-5; float16 logits: 4e-6).

    references/KEY.safetensors              hidden [n, t, d] or log_probs [n, t, v], and top [n, t] int32
    references/heads-2/IDENTITY.safetensors weight [v, d], bias [v]
    ... .json                               the hash of the file of that name, sealed
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...dsl.checker.values import DataRef
from ...dsl.syntax.diagnostics import Fault
from ..analysis.planning import keys
from ..core.cache import canonical_json_sha256, write_atomic
from ..core.hashes import cached_file_hash
from ..core.quantity import size_text
from ..core.sealed_json import cache_damaged, read_self_named_record, sealed_json_bytes
from ..models.checkpoints.pretrained import pretrained
from ..models.rows.forward import evaluating, finite, logits, memory_batches, slices_within_chunk_bytes
from ..plugin.context import Context

no_space = Fault("no-room", "The disk has no room for what a compile has to keep.", exit="resources")
other_vocabulary = Fault(
    "other-vocabulary", "A metric compares with the original's outputs and the model has another vocabulary."
)

FORMAT = 2
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32"}
Tail = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OriginalOutputs:
    """The original's outputs over the rows of one data set.

    top     [n, t] int32, the most probable next token
    outputs [n, t, d] what the output embedding was given, or [n, t, v] log-probabilities
    head    (weight, bias, name of the tail) where `outputs` is hidden states
    """

    top: Tensor
    outputs: Tensor
    head: tuple[Tensor, Tensor | None, str] | None = None

    def of_rows(self, indices: Sequence[int]) -> "OriginalOutputs":
        """Outputs over some of the rows."""
        return replace(self, top=self.top[list(indices)], outputs=self.outputs[list(indices)])

    @torch.no_grad()
    def logits(self, rows: slice, positions: slice) -> Tensor:
        """[c, vocab] float32 of some positions of some rows: equal to the original's up to a constant per row."""
        values = self.outputs[rows].flatten(0, 1)[positions]  # [c, d] or [c, vocab]
        if self.head is None:
            return values.float()
        weight, bias, tail = self.head
        return tail_from_name(tail)(nn.functional.linear(values, weight, bias)).float()


def write_reference_once(ctx: Context, model: nn.Module, ref: DataRef) -> None:
    """Keep what `model`, the original as loaded, says of a data set; nothing to do where that is kept."""
    write_original_outputs(
        ctx, model, ctx.rows(ref), _reference_path(ctx, ref), _head_path(ctx), f"original on {ref.name}"
    )


def write_original_outputs(
    ctx: Context, model: nn.Module, rows: Tensor, file: Path, head_file: Path, label: str
) -> None:
    """Keep what a model says of rows in two files; nothing to do where that is kept."""
    if file.is_file():
        return
    head = pretrained(model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    last = head if isinstance(head, nn.Linear) else None
    tail = _infer_logits_tail(model, last, rows[:1]) if last is not None else None
    last = None if tail is None else last
    if last is not None and tail is not None:
        _write_output_embedding(ctx, head_file, last, tail)
    positions_per_row, width = _predictions_per_row_and_classes(model, rows)
    width, dtype = (last.in_features, last.weight.dtype) if last is not None else (width, torch.float16)
    output_name = "hidden" if last is not None else "log_probs"
    shapes = {
        output_name: (dtype, (len(rows), positions_per_row, width)),
        "top": (torch.int32, (len(rows), positions_per_row)),
    }
    with full(file, shapes) as write:
        tops = []
        for batch in ctx.each(list(memory_batches(model, rows)), label):
            outputs, top = _hidden(model, last, batch) if last is not None else _log_probs(model, batch)
            write(outputs)
            tops.append(top)
        write(torch.cat(tops))
        ctx.origin.refuse_changed_files()


def load_or_make_reference(ctx: Context, ref: DataRef) -> OriginalOutputs:
    """Reference written by `write_reference_once`, mapped from disk; one object for all calls.

    Where nothing was prepared, the original is loaded once more: mapped weights cost no memory of their own.
    """
    if ref.name not in ctx._references:
        path = _reference_path(ctx, ref)
        if not path.is_file():
            write_reference_once(ctx, ctx.origin.load(), ref)
        ctx._references[ref.name] = open_reference(path, _head_path(ctx))
    return ctx._references[ref.name]


def open_reference(path: Path, head_path: Path) -> OriginalOutputs:
    """Open the two files that `keep` wrote, mapped."""
    tensors = map_verified_file(path)
    if "hidden" not in tensors:
        return OriginalOutputs(tensors["top"], tensors["log_probs"])
    head = map_verified_file(head_path)
    with safe_open(head_path, "pt") as file:
        tail = file.metadata()["tail"]
    return OriginalOutputs(tensors["top"], tensors["hidden"], (head["weight"], head.get("bias"), tail))


def mean_kl_divergence(
    model: nn.Module, rows: Tensor, reference: OriginalOutputs, metric_name: str, data_name: str = ""
) -> float:
    """Mean over all predictions of KL(reference || model), in nats."""
    return finite(kl_divergences(model, rows, reference, metric_name).mean().item(), metric_name, data_name)


def kl_divergences(model: nn.Module, rows: Tensor, reference: OriginalOutputs, metric_name: str) -> Tensor:
    """KL(reference || model) of the predictions of each row, in nats: [rows, predictions] float64."""
    divergences = []
    for logits_new, logits_original in iterate_logits_beside_reference(model, rows, reference, metric_name):
        q, p = logits_new.log_softmax(-1), logits_original.log_softmax(-1)  # [c, vocab]
        divergences.append(nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).cpu().double())
    # Rounding of float32 sums may fall below 0, which no divergence does.
    return torch.cat(divergences).view(len(rows), -1).clamp(min=0.0)


def iterate_logits_beside_reference(
    model: nn.Module, rows: Tensor, reference: OriginalOutputs, metric_name: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ours, theirs) logits [c, vocab] in float32, chunk by chunk over all rows."""
    at = 0
    with evaluating(model):
        for batch in memory_batches(model, rows):
            new = logits(model, batch).flatten(0, 1)  # [b * t, vocab]
            for part in slices_within_chunk_bytes(new):
                original = reference.logits(slice(at, at + len(batch)), part)
                if original.shape[-1] != new.shape[-1]:
                    raise other_vocabulary(
                        f"{metric_name} compares {new.shape[-1]} logits with the original's {original.shape[-1]}",
                        help="compare models of different vocabularies by `perplexity`",
                    ).rejection()
                yield new[part].float(), original.to(new.device)
            at += len(batch)


# -- what the output embedding does --------------------------------------------------------------------------


def tail_from_name(name: str) -> Tail:
    """Last operations of a model on its logits: "", "cap:30.0" (tanh), "scale:0.125"."""
    kind, _, number = name.partition(":")
    if kind == "cap":
        return lambda x: torch.tanh(x / float(number)) * float(number)
    if kind == "scale":
        return lambda x: x * float(number)
    assert not kind, f"no tail {name}"
    return lambda x: x


def _infer_logits_tail(model: nn.Module, head: nn.Linear, rows: Tensor) -> str | None:
    """Tail that turns the output of the output embedding into the model's logits; None where none does."""
    config = pretrained(model).config.get_text_config()
    known = [""]
    if cap := getattr(config, "final_logit_softcapping", None):
        known.append(f"cap:{cap}")
    if scale := getattr(config, "logits_scaling", None):
        known.append(f"scale:{1 / scale}")
    if scale := getattr(config, "logit_scale", None):
        known.append(f"scale:{scale}")
    with evaluating(model):
        inputs, values = _head_inputs_and_logits(model, head, rows)
        if len(inputs) != 1 or inputs[0].shape[:-1] != values.shape[:-1]:
            return None
        plain = nn.functional.linear(inputs[0], head.weight, head.bias)
        tolerance = values.float().abs().max().item() * 2e-2 if values.dtype != torch.float32 else 1e-4
        return next(
            (t for t in known if (tail_from_name(t)(plain).float() - values.float()).abs().max() <= tolerance), None
        )


def _head_inputs_and_logits(model: nn.Module, head: nn.Module, batch: Tensor) -> tuple[list[Tensor], Tensor]:
    """Inputs of the output embedding, call by call, and the logits."""
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        return inputs, logits(model, batch)
    finally:
        handle.remove()


def _hidden(model: nn.Module, head: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    with evaluating(model):
        (inputs,), values = _head_inputs_and_logits(model, head, batch)
        return inputs, values.argmax(-1).int()


def _log_probs(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    with evaluating(model):
        values = logits(model, batch)
        flat = values.flatten(0, 1)
        logged = torch.cat([flat[part].float().log_softmax(-1).half() for part in slices_within_chunk_bytes(flat)])
        return logged.view(values.shape), values.argmax(-1).int()


def _predictions_per_row_and_classes(model: nn.Module, rows: Tensor) -> tuple[int, int]:
    """Number of predictions per row, and of tokens or classes in each."""
    with evaluating(model):
        _, positions_per_row, width = logits(model, rows[:1]).shape
        return positions_per_row, width


# -- files ---------------------------------------------------------------------------------------------------


def _reference_path(ctx: Context, ref: DataRef) -> Path:
    return reference_path(ctx, ref)


def reference_path(ctx: Context, ref: DataRef, *qualifiers: str) -> Path:
    """Path of the original's outputs for a data set; `qualifiers` name them where they are not token predictions."""
    key = canonical_json_sha256(
        [
            "reference",
            *qualifiers,
            FORMAT,
            ctx.origin.identity,
            keys.data_identity(ref, ctx),
            version("torch"),
            version("transformers"),
            ctx.settings.device,
        ]
    )
    return ctx.settings.cache_dir / "references" / f"{key}.safetensors"


def _head_path(ctx: Context) -> Path:
    return ctx.settings.cache_dir / "references" / f"heads-{FORMAT}" / f"{ctx.origin.identity}.safetensors"


def map_verified_file(path: Path) -> dict[str, Tensor]:
    """Map a file of the sealed writer; Reject (cache-damaged) where it was changed since.

    It is read whole once; a file that was not written since is not read again.
    """
    known = read_self_named_record(_seal_path(path), path.parent)
    if known is None or known.get("sha256") != cached_file_hash(path, path.parent):
        help = "delete it, then compile again"
        raise cache_damaged(f"{path} does not hold what was written there", help=help).rejection()
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def _seal_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_output_embedding(ctx: Context, path: Path, head: nn.Linear, tail: str) -> None:
    if path.is_file():
        return
    tensors = {"weight": head.weight} | ({"bias": head.bias} if head.bias is not None else {})
    with full(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {"tail": tail}) as write:
        for tensor in tensors.values():
            write(tensor.detach())
        ctx.origin.refuse_changed_files()


class full:
    """Writes a safetensors file front to back, a piece at a time; it appears when it is whole, and sealed."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ):
        self.location, self.draft = path, path.with_name(f".{path.name}.{os.getpid()}")
        entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self.size = 0
        for name, (dtype, shape) in shapes.items():
            end = self.size + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [self.size, end]}
            self.size = end
        text = json.dumps(entries).encode()
        self.header = text + b" " * (-len(text) % 8)  # tensors start aligned
        self.file: BinaryIO | None = None
        self.hash = hashlib.sha256()

    def __enter__(self) -> Callable[[Tensor], None]:
        self.location.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.location.parent).free
        if self.size > 0.9 * free:
            raise no_space(
                f"the original's outputs take {size_text(self.size)}, {size_text(free)} are free in "
                f"{self.location.parent}",
                help="give fewer `samples`, or another --cache-dir",
            ).rejection()
        self.file = open(self.draft, "wb")
        self._write(len(self.header).to_bytes(8, "little") + self.header)
        return lambda x: self._write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def _write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.hash.update(data)

    def __exit__(self, kind, *error) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        complete = self.file.tell() == 8 + len(self.header) + self.size
        self.file.close()
        if kind is None:
            assert complete, f"{self.location} was not filled"
            write_atomic(
                _seal_path(self.location),
                sealed_json_bytes({"key": self.location.stem, "sha256": self.hash.hexdigest()}),
            )
            os.replace(self.draft, self.location)
        else:
            self.draft.unlink(missing_ok=True)
