"""A program of torch alone, which reads neither effc nor transformers."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.syntax.diagnostics import Fault, Reject
from ..artifacts.artifact import NOTES
from ..artifacts.openers.export import STEP
from ..core.json_errors import first_line
from ..ir.program import Program
from ..plugin.context import Context
from ..plugin.interfaces import param
from ..plugin.target import Form, LoadRequest, Target
from ..plugin.weight_sizes import Weights

if TYPE_CHECKING:
    import torch
    from torch import nn

cannot_export = Fault(
    "cannot-export",
    "torch.export can't make a program of a model.\n\n"
    "It follows all that a forward does, as capture does, but under restrictions of its own.",
    exit="environment",
)

FOLDER = "program"
_NODES = 12_300  # bytes of nodes and of where they come from, for each weight


class Pt2(Target):
    """A program of torch alone, which reads neither effc nor transformers.

    `torch.export.load("program/model.pt2").module()` gives a callable that takes what the forward takes, in batches
    of any size by name, and returns its result, of models of transformers the logits of prompts of any length;
    without a cache. `effc.load` fills in a mask and positions where they are not given. The one form for plain
    PyTorch modules, which have no config to be rebuilt from. Of a model with packed weights the program calls effc's
    kernels: `import effc.kernels.ops` before it is loaded.

    With `context` a second program beside it, `step.pt2`, continues text: it takes keys and values with places for
    that many tokens, and gives them with the new ones; the model card says how it is called, and weights lie in both
    files. A fresh process takes 32 greedy tokens from it by torch alone, and `effc run` talks to it.

    It has no package of native code by torch's AOTInductor: loading one is running it, and an artifact runs nothing,
    so that nobody whom it is sent to could verify, test or run it here. docs/targets.md has the lines that make one
    of the first program for yourself; torch 2.13 makes none of the second.

    Source: torch.export.
    Example: pt2("exported")
    """

    loads = {"program": '`program/model.pt2` is a program of torch alone: `torch.export.load`, or `effc.load(".")`.'}
    marks = {"program": "model.pt2"}
    does = {"program": "torch runs an exported graph of listed operators"}

    context: int | None = param(
        "Tokens that keys and values of a program which continues text have places for; without it none is written.",
        default=None,
        ge=64,
    )

    def cannot_hold(self) -> Mapping[str, str]:
        reason = "a program is the same for every row, and what is edited follows from where the row's prompt lies"
        return {"interventions": reason}

    def emit(self, program: Program, destination: Path, ctx: Context) -> None:
        import torch

        from ..artifacts.exported import write_program_and_kernels
        from ..evaluation.results import example_inputs_by_name, refuse_encoder_decoder, with_main_output_only
        from ..ir.layers.linear import count_params
        from ..models.rows.forward import in_eval_mode

        folder = destination / FOLDER
        folder.mkdir()
        refuse_encoder_decoder(program.model, cannot_export)
        inputs = example_inputs_by_name(program)
        with in_eval_mode(program.model), torch.no_grad():
            try:
                exported = torch.export.export(
                    with_main_output_only(program.model),
                    (),
                    inputs,
                    dynamic_shapes={
                        name: _dynamic_first_axes(x, 2 if "input_ids" in inputs else 1) for name, x in inputs.items()
                    },
                )
            except Exception as error:  # whatever torch meets in a forward
                raise _cannot_export_diagnostic(program.model, error).rejection() from error
        if "input_ids" in inputs and not _runs_on_longer_inputs(exported, inputs):
            raise cannot_export(
                f"torch.export makes a program of {type(program.model).__name__} for short prompts only: how "
                "often something is repeated follows from their number",
                help="`native` and `hf` take any length",
            ).rejection()
        ops = write_program_and_kernels(exported, tuple(inputs), folder, count_params(program.model))
        notes = (
            [f"The program calls {', '.join(ops)}: `import effc.kernels.ops` before torch.export.load."] if ops else []
        )
        notes += self._write_decode_step_program(program.model, folder, ctx)
        if notes:
            (destination / NOTES).write_text(json.dumps(notes), encoding="utf-8")

    def _write_decode_step_program(self, model: "nn.Module", folder: Path, ctx: Context) -> list[str]:
        """The program that continues text, where one is asked for; sentences of it."""
        from ..artifacts.exported_steps import step_usage_note, write_step_facts
        from ..models.checkpoints.sidecar_files import copy_sidecar_files

        if not self.context:
            return []
        facts = _export_and_save_decode_step(model, self.context, folder)
        copy_sidecar_files(model, ctx.origin, folder)
        write_step_facts(facts, folder)
        return [step_usage_note(facts, STEP)]

    def files(self, weights: Weights) -> tuple[int, dict[str, float]]:
        """A program has weights and nodes; the second one has them, too."""
        program = self.weight_bytes(weights) + _NODES * len(weights.tensors)
        return 2 * program + weights.sidecars if self.context else program, {}

    def context_tokens(self) -> int | None:
        return self.context

    def check_requirements(self, ctx: Context) -> None:
        from ..evaluation.results import refuse_encoder_decoder
        from ..models.checkpoints.meta_init import without_storage

        with without_storage():
            refuse_encoder_decoder(ctx.origin.build(), cannot_export)

    def foresee(self, ctx: Context) -> None:
        from ..models.checkpoints.meta_init import without_storage

        if self.context:
            with without_storage():
                _refuse_incompatible_context(ctx.origin.build(), self.context)

    def forms(self) -> tuple[Form, ...]:
        generates, steps = bool(self.context), 32 if self.context else 8
        return (Form(FOLDER, "export", padded=generates, generates=generates, steps=steps),)

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        from ..artifacts.exported import check_exported_folder

        check_exported_folder(folder)

    @classmethod
    def tensors(cls, file: Path) -> "Iterator[tuple[str, torch.Tensor]]":
        from ..artifacts.exported import map_program_tensors

        return map_program_tensors(file) if file.suffix == ".pt2" else super().tensors(file)

    @classmethod
    def open(cls, folder: Path, load_request: LoadRequest) -> tuple[Any, None]:
        from ..artifacts.exported import load_exported_model

        model = load_exported_model(folder)
        return (model if load_request.dtype is None else model.to(load_request.dtype)), None


def _cannot_export_diagnostic(model: "nn.Module", error: Exception) -> Any:
    return cannot_export(
        f"torch.export makes no program of {type(model).__name__}: {first_line(error)}",
        help="--debug shows where; `hf` writes transformers models in another way",
    )


_LEAST = 64  # tokens: what the check in a fresh process takes, and some; `context` says it, too


def _refuse_incompatible_context(model: Any, context: int) -> None:
    """Raise Reject of a model that continues no text, or not that much."""
    from transformers import PreTrainedModel

    from ..runtimes.native.kv_tensors import refuse_recurrent_layers

    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.main_input_name != "input_ids":
        raise cannot_export(
            f"{type(model).__name__} continues no text", help="leave `context` out", argument="context"
        ).rejection()
    refuse_recurrent_layers(model, cannot_export, "`native` holds it; or leave `context` out")
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    if context > max_positions:
        raise cannot_export(
            f"a context of {context} tokens is longer than the {max_positions} positions of the model",
            help=f"write `context: {min(max_positions, 1024)}`" if max_positions >= _LEAST else "leave `context` out",
            argument="context",
        ).rejection()


def _export_and_save_decode_step(model: "nn.Module", context: int, folder: Path) -> dict[str, Any]:
    import torch

    from ..artifacts.exported import save_and_verify_program
    from ..artifacts.exported_steps import export_decode_step
    from ..models.rows.forward import in_eval_mode

    _refuse_incompatible_context(model, context)
    with in_eval_mode(model), torch.no_grad():
        try:
            step_program, facts = export_decode_step(model, context, cannot_export)
        except Reject:
            raise
        except Exception as error:  # whatever torch meets in a forward
            raise _cannot_export_diagnostic(model, error).rejection() from error
    save_and_verify_program(step_program, ("given", "before", "past"), folder / STEP)
    return facts


def _dynamic_first_axes(x: Any, n_axes: int) -> Any:
    """The first axes are of any size."""
    from torch.export import Dim

    return dict.fromkeys(range(n_axes), Dim.AUTO) if x.dim() else None


def _runs_on_longer_inputs(exported: Any, inputs: dict[str, Any]) -> bool:
    """Whether a program runs with several times as many tokens as it was traced with."""
    import torch

    longer = {name: torch.cat([x] * 5, 1) for name, x in inputs.items()}
    try:
        with torch.no_grad():
            exported.module()(**longer)
    except (AssertionError, RuntimeError):  # its guards, or an operation on a shape that was fixed
        return False
    return True
