"""ONNX for ONNX Runtime: decoders with keys and values as inputs and outputs, anything else as it is."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...dsl.syntax.diagnostics import Diagnostic
from ..artifacts.artifact import NOTES
from ..core.environment import check_modules
from ..ir.program import Program
from ..models.checkpoints.sidecar_files import copy_sidecar_files
from ..plugin.context import Context
from ..plugin.interfaces import Pass, param
from ..plugin.target import Form, LoadRequest, Target
from ..plugin.weight_sizes import Weight, Weights

if TYPE_CHECKING:
    import torch
    from torch import nn

FOLDER = "onnx"
# Of root mean squares. Another library sums in another order: 7e-5 of the largest logit on SmolLM2 in float32.
SHARE, SHARE_OF_HALF = 1e-3, 0.06
_NODES = {"none": 1600, "int8": 2500}  # bytes of the graph, for each weight
_REASON = "ONNX Runtime sums in an order of its own"


def onnx_logit_tolerance(model: "nn.Module") -> float:
    """Tolerance of logits; a model in half precision is written in float32, and differs from it by that much."""
    import torch

    return SHARE if all(p.dtype == torch.float32 for p in model.parameters()) else SHARE_OF_HALF


FLOAT = Form(FOLDER, "engine", rounds=onnx_logit_tolerance, reason=_REASON, steps=32)


class Onnx(Target):
    """ONNX for ONNX Runtime: decoders with keys and values as inputs and outputs, anything else as it is.

    `onnx/model.onnx` has the pruned shapes, in float32, its weights in `model.onnx.data` beside it. A causal language
    model takes `input_ids`, `attention_mask`, `position_ids` and `past_key_values.N.key` and `.value` of any batch and
    length, empty ones for a prompt, and gives `logits` and `present.N.key` and `.value`. Encoders, vision models and
    plain modules take what their forward takes. An encoder with a decoder, of texts or of sounds, is three graphs:
    what reads or hears, what begins a target and what goes on with it. Before a compile succeeds a fresh process runs
    it in ONNX Runtime: logits, and 32 greedy tokens. State-space mixers, linear attention and packed weights have no
    standard op and are refused by name. `effc.load`, `effc run` and `effc serve` open it through ONNX Runtime, and
    onnxruntime-genai a decoder's `onnx/`, by the `genai_config.json` in it.

    `weights: nbits` writes the codes that `quantize.*` left on linear modules, in 4 or 8 bits, as the op `MatMulNBits`
    of ONNX Runtime: nothing is rounded again. Other weights stay float32.

    Source: torch.onnx, `dynamo=True`; dynamic int8: onnxruntime.quantization.
    Example: onnx("runtime")
    """

    extra: ClassVar[str] = "onnx"
    requires: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    on_cpu = True
    loads = {
        "onnx": '`onnx/model.onnx` is run by ONNX Runtime: `effc.load(".")`, `effc run .`, or any other host of it.'
    }
    marks = {"onnx": "model.onnx encoder_model.onnx"}
    does = {"onnx": "ONNX Runtime runs a graph of listed ops, from the bytes that were checked"}

    formats = (
        ({"dynamic": "int8"}, (), ""),
        ({"weights": "nbits"}, ("quantize.gptq(data: {data}, group: 32)",), ""),
        ({"weights": "nbits", "dynamic": "int8"}, ("quantize.gptq(data: {data}, group: 32)",), ""),
    )

    weights: Literal["dense", "nbits"] = param(
        "Weights that `quantize.*` left on a grid: in float32, or their codes as `MatMulNBits` of ONNX Runtime.",
        default="dense",
    )
    dynamic: Literal["none", "int8"] = param(
        "`int8` keeps weights of matrix products in int8 and rounds what they multiply as it comes; codes of "
        "`weights: nbits` stay, and meet inputs that are rounded so. The graph is compared before it is rounded; what "
        "int8 loses is reported, and judged by bounds.",
        default="none",
    )

    def cannot_hold(self) -> Mapping[str, str]:
        return {
            "packed weights": "ONNX has no ops that read them",
            "pruned caches": "ONNX has no cache that forgets",
            "interventions": "a graph is the same for every row, and what is edited follows from where its prompt lies",
        }

    def emit(self, program: Program, destination: Path, ctx: Context) -> None:
        check_modules(self.requires, self.extra, "the target `onnx`")
        from transformers import PreTrainedModel

        from ..artifacts.verify import verify_forms
        from ..runtimes.onnx.checking import graphs_in
        from ..runtimes.onnx.export import decodes
        from ..runtimes.onnx.genai import write_genai_config_and_describe
        from ..runtimes.onnx.quantization import quantize_graphs

        folder, model = destination / FOLDER, program.model
        folder.mkdir()
        notes = self._export(program, folder)
        if isinstance(model, PreTrainedModel):
            copy_sidecar_files(model, ctx.origin, folder)
            model.config.save_pretrained(folder)  # which other hosts of ONNX ask for
            if decodes(model) and len(graphs_in(folder)) == 1:
                notes.append(write_genai_config_and_describe(model, folder))
        if notes:
            (destination / NOTES).write_text(json.dumps(notes), encoding="utf-8")
        if self.dynamic == "int8":  # what int8 loses can't be told from a fault: the graph is compared before
            verify_forms(destination, program.model, [FLOAT], seed=ctx.seed)
            quantize_graphs(folder)

    def _export(self, program: Program, folder: Path) -> list[str]:
        """Write the graphs; sentences for the model card."""
        from ..artifacts.nbits_modules import nbits_notes, pack_nbits_modules
        from ..runtimes.onnx.export import export_onnx

        if self.weights == "dense":
            export_onnx(program, folder, {})
            return []
        linears = pack_nbits_modules(program)
        export_onnx(program, folder, linears.packed)
        return nbits_notes(linears)

    def weight_bytes(self, weights: Weights) -> int:
        """Numbers are float32; on int8 those of matrices and tables, with a scale and a zero for each output."""
        from ..models.checkpoints.pack_quantized import Scheme
        from ..runtimes.onnx.nbits import block_size, nbits_bytes

        def size(weight: Weight) -> float:
            if self.weights == "nbits" and weight.grid is not None and not weight.table and len(weight.shape) == 2:
                scheme = Scheme.smallest_for_grid(*weight.grid)
                block = block_size(scheme.group, weight.shape[1])
                if block is not None:
                    return nbits_bytes(*weight.shape, scheme.bits, block, scheme.symmetric)
            if self.dynamic == "int8" and len(weight.shape) > 1:
                return weight.numel + 5 * weight.shape[0]
            return 4 * weight.numel

        return weights.stored(size)

    def files(self, weights: Weights) -> tuple[int, dict[str, float]]:
        """Torch exports a graph layer by layer, and checks and rewrites it."""
        nodes = _NODES[self.dynamic] * len(weights.tensors)
        return self.weight_bytes(weights) + nodes + weights.sidecars, {"seconds": 4.0 + 1.4 * weights.n_layers}

    def foresee(self, ctx: Context) -> None:
        from ..runtimes.onnx.export_support import refuse_unsupported_model

        refuse_unsupported_model(ctx)

    def lacks(self, earlier_passes: Sequence[Pass]) -> Diagnostic | None:
        from ..artifacts.nbits_modules import diagnostic_for_steps

        return diagnostic_for_steps(earlier_passes) if self.weights == "nbits" else None

    def forms(self) -> tuple[Form, ...]:
        return (replace(FLOAT, loses="int8") if self.dynamic == "int8" else FLOAT,)

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        from ..runtimes.onnx.checking import graphs_in, load_initializers, read_checked_onnx
        from ..runtimes.onnx.genai import check_genai_config

        check_modules(("onnx",), cls.extra, "an artifact of the target `onnx`")
        for name in graphs_in(folder):
            load_initializers(folder, read_checked_onnx(folder, name), name)
        check_genai_config(folder)

    @classmethod
    def tensors(cls, file: Path) -> "Iterator[tuple[str, torch.Tensor]]":
        from ..runtimes.onnx.checking import load_initializers, read_checked_onnx

        if file.suffix != ".onnx":
            return super().tensors(file)
        return iter(load_initializers(file.parent, read_checked_onnx(file.parent, file.stem), file.stem).items())

    @classmethod
    def summary(cls, folder: Path) -> Any:
        from ..runtimes.onnx.summary import summarise_onnx

        check_modules(cls.requires, cls.extra, "an artifact of the target `onnx`")
        return summarise_onnx(folder)

    @classmethod
    def open(cls, folder: Path, load_request: LoadRequest) -> tuple[Any, None]:
        from ..artifacts.load import other_kind
        from ..runtimes.onnx.model import open_onnx

        check_modules(cls.requires, cls.extra, "an artifact of the target `onnx`")
        if load_request.dtype is not None or str(load_request.device or "cpu").partition(":")[0] != "cpu":
            raise other_kind(
                f"{folder} is run by ONNX Runtime as it is", help="load it without dtype or device"
            ).rejection()
        return open_onnx(folder, load_request.threads), None
