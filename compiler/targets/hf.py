"""Checkpoint folders that transformers or `effc.load` read."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...dsl.checker.rules import Conflict, Problem
from ...dsl.checker.values import Bytes
from ...dsl.syntax.diagnostics import Diagnostic, Fault
from ..artifacts.artifact import NOTES
from ..artifacts.checkpoint_folders import CheckpointTarget
from ..artifacts.compact_config import KEY, lock_config_to_effc, make_compact_record
from ..artifacts.compat import Padding, plan_padding_to_stock
from ..artifacts.gridded_modules import quantizer_steps
from ..artifacts.packed_modules import COMPRESSED, PackedModules, pack_modules
from ..artifacts.stock import stock_config
from ..core.environment import check_modules, refuse_missing_packages
from ..ir.program import Program
from ..ir.weights import distinct_tensors
from ..models.checkpoints.mamba_rescale import NOTE, disable_rescaling, rescales_residual_weights
from ..models.checkpoints.meta_init import resized_unsaved_buffers
from ..models.checkpoints.pack_quantized import Scheme
from ..models.checkpoints.sidecar_files import copy_sidecar_files
from ..models.checkpoints.tensor_files import LazyTensor, write_safetensors_files
from ..plugin.context import Context
from ..plugin.interfaces import Pass, param
from ..plugin.target import Form
from ..plugin.weight_sizes import Weight, Weights

cannot_write_form = Fault("cannot-write-form", "A recipe asks for a checkpoint that its model can't have.")

FORMS = (Form("compact", "effc"), Form("model", "plain"), Form("compat", "plain", padded=True))


class Hf(CheckpointTarget):
    """Checkpoint folders that transformers or `effc.load` read.

    `model/` is an ordinary checkpoint; it is written where the shapes are those of some config. Otherwise
    there are two folders: `compact/` with the true shapes, which `effc.load` reads, and `compat/`, which
    plain transformers reads: the same logits, but every layer filled up with zeros to the width of the widest,
    so it saves what all of them lost. Packed weights, which passes of `lower` make, are in `compact/` alone.

    `format: compressed` packs weights that `quantize.*` left on a grid as `pack-quantized` of compressed-tensors: the
    same codes, in 4 or 8 bits, which transformers reads where that package is installed. Other weights stay in the
    model's type, zeros too. It needs the shapes of a config.

    Source: own.
    Example: hf("hf")
    """

    loads = {
        "compact": '`compact/` has the true shapes: `effc.load(".")` (needs `pip install effc`).',
        "model": '`model/` is an ordinary checkpoint: `AutoModelForCausalLM.from_pretrained("model")`.',
        "compat": "`compat/` has the original shapes, filled with zeros: loads with plain transformers, same "
        "logits, none of the saving.",
    }
    does = {
        "model": "transformers builds a stock model from `model/config.json` and maps its safetensors",
        "compat": "transformers builds a stock model from `compat/config.json` and maps its safetensors",
        "compact": "effc builds the original from its config, replays listed edits, and maps safetensors",
    }

    form: Literal["auto", "stock", "compact", "compat", "both"] = param(
        "Which folders; `auto` is stock where shapes allow it, else compact and, where it can be, compat.",
        default="auto",
    )
    format: Literal["dense", "compressed"] = param(
        "Weights that `quantize.*` left on a grid: in the model's type, or their codes as `pack-quantized` of "
        "compressed-tensors.",
        default="dense",
    )
    shard: Bytes = param("Largest size of one weights file.", default=Bytes(5_000_000_000))

    def problems(self) -> Iterator[Problem]:
        if self.format == "compressed" and self.form in ("compact", "compat", "both"):
            yield Conflict(
                ("form", "format"),
                "packed weights are read into the shapes of a config",
                "leave `form` out, or take `format: dense`",
            )

    def cannot_hold(self) -> Mapping[str, str]:
        shapes = {
            "uneven widths": "a config has one width for all layers",
            "missing branches": "a config has every branch in every layer",
        }
        modules = {
            "packed weights": "transformers has no kernels that read them",
            "pruned caches": "transformers has no cache that forgets",
            "interventions": "transformers has no modules that edit hidden states of the prompt",
        }
        form = "stock" if self.format == "compressed" else self.form
        return {"stock": shapes | modules, "compat": modules}.get(form, {})

    def emit(self, program: Program, destination: Path, ctx: Context) -> None:
        notes = [f"{NOTE[0].upper()}{NOTE[1:]}."] if rescales_residual_weights(ctx.origin.config) else []
        config, reasons = stock_config(program.model) if self.form != "compact" else (None, [])
        packed = None
        if self.format == "compressed" and not reasons:
            packed = pack_modules(program)
            notes += packed.notes()
        for form in self._forms_to_write_or_reject(program.model, reasons, notes):
            if form == "compat":
                self._write_compat_or_note(program, config, destination, ctx, notes)
            elif form == "stock":
                write_stock_checkpoint(program, config, destination, ctx, self.shard.value, packed=packed)
            else:
                write_compact_checkpoint(program, destination, ctx, self.shard.value)
        if notes:
            (destination / NOTES).write_text(json.dumps(notes), encoding="utf-8")

    def files(self, weights: Weights) -> tuple[int, dict[str, float]]:
        """Estimated files; where no config has the shapes, a folder of the original's shapes is written as well."""
        uneven = self.form == "auto" and self.format == "dense" and not weights.uniform
        both = self.form == "both" or uneven
        return self.weight_bytes(weights) + both * weights.original + (1 + both) * weights.sidecars, {}

    def weight_bytes(self, weights: Weights) -> int:
        """Weights on a grid take the bits of their codes, scales and zeros, where they are packed. Uneven layers are
        filled up to the shapes of the original in `compat`."""
        if self.form == "compat" and not weights.uniform:
            return weights.original

        def size(weight: Weight) -> float:
            if self.format == "dense" or weight.grid is None or weight.table or len(weight.shape) != 2:
                return weight.numel * weights.itemsize
            bits, group, symmetric = weight.grid
            return Scheme.smallest_for_grid(bits, group, symmetric).stored_bytes(*weight.shape, weights.itemsize)

        return weights.stored(size)

    def check_requirements(self, ctx: Context) -> None:
        if self.format == "compressed":
            check_modules(("compressed_tensors",), "compressed", "`format: compressed` of `hf`")
            refuse_missing_packages(("compressed-tensors",))

    def lacks(self, earlier_passes: Sequence[Pass]) -> Diagnostic | None:
        return (
            COMPRESSED.no_grid_diagnostic()
            if self.format == "compressed" and not quantizer_steps(earlier_passes)
            else None
        )

    def forms(self) -> tuple[Form, ...]:
        return FORMS

    def _forms_to_write_or_reject(self, model: Any, reasons: list[str], notes: list[str]) -> tuple[str, ...]:
        """Forms to write; Reject where stock is named and impossible, for `reasons`."""
        if self.form in ("auto", "stock"):
            if not reasons:
                return ("stock",)
            if self.form == "stock" or self.format == "compressed":
                raise cannot_write_form(
                    f"no config of {type(model).__name__} has these shapes: {_first_reason_and_count(reasons)}",
                    help="`form: auto` and `format: dense` write compact and compat folders instead",
                    argument="format form",
                ).rejection()
            notes.append(f"There is no stock checkpoint: {_first_reason_and_count(reasons)}.")
        return ("compact", "compat") if self.form in ("auto", "both") else (self.form,)

    def _write_compat_or_note(
        self, program: Program, stock_base: Any, destination: Path, ctx: Context, notes: list[str]
    ) -> None:
        filled = plan_padding_to_stock(program, stock_base)
        if not filled.reasons:
            write_compat(program, filled, destination, ctx, self.shard.value)
        elif self.form == "auto":
            notes.append(f"There is no compat checkpoint: {_first_reason_and_count(filled.reasons)}.")
        else:
            raise cannot_write_form(
                f"zeros can't fill it up to stock shapes: {_first_reason_and_count(filled.reasons)}",
                help="`form: compact` writes the true shapes",
            ).rejection()


def write_stock_checkpoint(
    program: Program,
    config: Any,
    destination: Path,
    ctx: Context,
    shard_bytes: int,
    folder_name: str = "model",
    packed: PackedModules | None = None,
) -> None:
    """`config` is that of `stock_config`; weights of `packed` modules are written so."""
    folder, model = destination / folder_name, program.model
    folder.mkdir()
    tensors = distinct_tensors(model)
    if packed is not None:
        tensors, config = packed.replace_weights(tensors), copy.deepcopy(config)
        config.quantization_config = packed.config(model)
    write_safetensors_files(folder, [LazyTensor.of(*item) for item in tensors], shard_bytes)
    copy_sidecar_files(program.model, ctx.origin, folder)
    write_config_json(config, model, folder)


def write_stock_or_compact(program: Program, destination: Path, ctx: Context, shard_bytes: int) -> None:
    """A stock checkpoint where a config has the shapes, else a compact one."""
    config, reasons = stock_config(program.model)
    if reasons:
        write_compact_checkpoint(program, destination, ctx, shard_bytes)
    else:
        write_stock_checkpoint(program, config, destination, ctx, shard_bytes)


def write_compact_checkpoint(program: Program, destination: Path, ctx: Context, shard_bytes: int) -> None:
    folder, model = destination / "compact", program.model
    folder.mkdir()
    tensors = [*distinct_tensors(model), *resized_unsaved_buffers(model, program.edits.shapes).items()]
    write_safetensors_files(folder, [LazyTensor.of(*item) for item in tensors], shard_bytes)
    copy_sidecar_files(program.model, ctx.origin, folder)
    write_config_json(
        model.config,
        model,
        folder,
        make_compact_record(ctx.origin.config, program.edits.to_json(), str(model.dtype).removeprefix("torch.")),
    )


def write_compat(program: Program, filled: Padding, destination: Path, ctx: Context, shard_bytes: int) -> None:
    folder = destination / "compat"
    folder.mkdir()
    write_safetensors_files(folder, filled.padded_tensor_pieces(program), shard_bytes)
    copy_sidecar_files(program.model, ctx.origin, folder)
    write_config_json(filled.config, program.model, folder)


def write_config_json(config: Any, model: Any, folder: Path, compact_record: dict | None = None) -> None:
    """config.json, last of a folder's files: without it nothing loads. `compact_record` goes under the key `effc`."""
    config = copy.deepcopy(config)
    disable_rescaling(config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    if compact_record is not None:
        setattr(config, KEY, compact_record)
    config.save_pretrained(folder)
    if compact_record is not None:
        lock_config_to_effc(folder)


def _first_reason_and_count(reasons: list[str]) -> str:
    distinct_reasons = list(dict.fromkeys(reasons))
    further = f", and {len(distinct_reasons) - 1} more" if len(distinct_reasons) > 1 else ""
    return distinct_reasons[0] + further
