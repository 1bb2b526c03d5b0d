"""A GGUF file, as llama.cpp and what is built on it read models."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...dsl.checker.rules import Conflict, Problem, Unread
from ...dsl.checker.skeleton import Skeleton
from ...dsl.checker.values import DataRef
from ...dsl.syntax.diagnostics import Diagnostic
from ..artifacts.artifact import NOTES
from ..artifacts.load import other_kind
from ..core.environment import check_modules
from ..core.events import announcing_stage
from ..ir.program import Program
from ..models.checkpoints.pretrained import pretrained
from ..models.checkpoints.sidecar_files import copy_sidecar_files
from ..plugin.context import Context
from ..plugin.interfaces import Pass, param
from ..plugin.target import Form, LoadRequest, Target
from ..plugin.weight_sizes import Weight, Weights
from ..runtimes.gguf.number_types import FILE_TYPES, TYPES, type_of_matrix

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..runtimes.gguf.llama_rounding import Importance

FOLDER = "gguf"
_TOKEN = 32  # bytes of a token: its text, its kind, and a merge
# Of root mean squares: f32 sums in another order, the others round weights.
SHARES = {"f32": 1e-3, "f16": 0.01, "bf16": 0.06, "q8_0": 0.1, "q4_0": 0.1, "q4_1": 0.1}
_REASON = "weights are rounded as the file's type has them, and sums are taken in another order"
_REASON_OF_STORED = "sums are taken in another order than by the file's weights in transformers"


def rounding_tolerance(file_type: str, model: "nn.Module") -> float:
    """Error of logits that a file's type may cause, as a share of root mean squares.

    Types that llama.cpp rounds are compared with a model that has the file's weights.
    """
    import torch

    halves = any(p.dtype != torch.float32 for p in model.parameters())
    return max(SHARES["f32" if file_type in FILE_TYPES else file_type], SHARES["bf16"] if halves else 0.0)


def rounding_tolerance_in_llama(file_type: str, model: "nn.Module") -> float:
    """Error of logits that llama.cpp may cause over the file's type.

    It looks GELU up in a table of halves, and multiplies weights in blocks with inputs in 8 bits.
    """
    from ..runtimes.gguf.families import FAMILIES

    is_gelu = FAMILIES[pretrained(model).config.model_type].of.activation == "gelu"
    rounds_inputs = SHARES["q8_0"] if file_type in FILE_TYPES else 0.0
    return max(rounding_tolerance(file_type, model), SHARES["f16"] if is_gelu else 0.0, rounds_inputs)


class Gguf(Target):
    """A GGUF file, as llama.cpp and what is built on it read models.

    `gguf/model.gguf` has the pruned shapes, the tokenizer and the chat template. Llama, Mistral, Qwen2 and 3, Gemma 1
    to 3, Phi 1 to 4, StableLM, GLM-4, Granite, OLMo 2, SmolLM3, Cohere 1 and 2 and StarCoder2 whose layers are all
    alike are written under their own architecture; Llamas and Mistrals whose layers differ in width or heads, or lack
    their attention or MLP, as `deci`, which llama.cpp reads too. Before a compile succeeds a fresh process computes
    what the file says, reading nothing else, and llama.cpp does, tokens of texts too, where `llama-cpp-python` is
    installed. What llama.cpp can't hold, or would get wrong without a word, is refused by name.

    `q2_k` to `q6_k` and the `iq` types are rounded by llama.cpp's own quantiser (extra `llama`). The matrices of layers
    all have the type that is named, as under `llama-quantize --pure`; llama.cpp's mixtures (`Q4_K_M`) are not written.
    The head, and an embedding that is tied to it, have `q6_k`, or `q5_k` with a type that needs `data`; an embedding
    that is not tied has at least `q2_k`, or `iq3_s` with `iq2_s` and `iq3_xxs`. A row that no blocks of 256 fill takes
    what llama.cpp falls back to: `q4_0` for `q2_k` and `q3_k`, `q5_0` for `q4_k`, `q5_1` for `q5_k`, `q8_0` for `q6_k`
    and heads, `iq4_nl` for `iq` types; one that no blocks of 32 fill `f16`. A note counts the types and says how far
    weights are off. With `data`, errors of a column count as much as the mean square of what it is multiplied with.

    Source: the GGUF specification of ggml; tensor names and `deci` of llama.cpp; its src/llama-quant.cpp for types of
    matrices, and tools/imatrix for `data`.
    Example: gguf("llamacpp", type: f16)
    """

    extra: ClassVar[str] = "gguf"
    requires: ClassVar[tuple[str, ...]] = ("gguf",)
    on_cpu = True
    calibrates: ClassVar[bool] = True  # its `data` shape the file: no bound on it is judged by them
    loads = {"gguf": '`gguf/model.gguf` is for llama.cpp and its kin; `effc.load(".")` and `effc run .` read it too.'}
    marks = {"gguf": "model.gguf"}
    does = {"gguf": "counts and places are held against the file, then effc's engine computes with its tensors"}

    formats = (
        ({"type": "q8_0"}, (), ""),
        ({"type": "q4_0"}, ("quantize.gptq(data: {data}, group: 32, zero: middle)",), ""),
        ({"type": "q4_1"}, ("quantize.gptq(data: {data}, group: 32)",), ""),
    )

    type: Literal[
        "f32",
        "f16",
        "bf16",
        "q8_0",
        "q4_0",
        "q4_1",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "iq1_s",
        "iq1_m",
        "iq2_xxs",
        "iq2_xs",
        "iq2_s",
        "iq3_xxs",
        "iq3_s",
        "iq4_nl",
        "iq4_xs",
    ] = param(
        "Numbers of matrices; `q8_0` has 8 bits and a scale for each 32 of a row, `q4_0` and `q4_1` the codes that "
        "`quantize.*` left in groups of 32, and q8_0 where it left none; the others are rounded by llama.cpp.",
        default="f16",
    )
    data: DataRef | None = param(
        "Rows over which llama.cpp's importance matrix is taken, where it rounds: mean squares of what each column of "
        "a matrix is multiplied with. Types of about two bits and `iq3_xxs` need it.",
        default=None,
    )

    def problems(self) -> Iterator[Problem]:
        if self.type in ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"):
            yield Unread(("data",), "types that llama.cpp rounds, as `type: q4_k`", ("type",))
        elif self.data is None and self.type in ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"):
            yield Conflict(
                ("type",),
                "llama.cpp rounds to this type with an importance matrix alone, and there is no `data` to take it over",
                "declare rows, such as `data calib = text(...)`, and write `data: calib`, or take another type: "
                "`iq3_s`, `iq4_xs` and `q2_k` to `q6_k` need none",
            )

    def cannot_hold(self) -> Mapping[str, str]:
        refused = {
            "packed weights": "llama.cpp packs weights in its own ways",
            "pruned caches": "llama.cpp has no cache that forgets as this one does",
            "interventions": "llama.cpp has no step that edits hidden states of the prompt",
        }
        if self.type == "q4_0":
            refused["codes whose 0 lies anywhere"] = (
                "0 is the middle code of every block of `q4_0`: quantise with `zero: middle`, or write `type: q4_1`"
            )
        return refused

    def emit(self, program: Program, destination: Path, ctx: Context) -> None:
        from ..runtimes.gguf.writing import write_gguf_and_notes

        check_modules(self.requires, self.extra, "the target `gguf`")
        refuse_gguf_unwritable_config(program.model)
        folder = destination / FOLDER
        folder.mkdir()
        importance = self._importance(program, ctx)
        notes = write_gguf_and_notes(program.model, folder, self.type, ctx.origin.tokenizer(), importance)
        copy_sidecar_files(program.model, ctx.origin, folder)
        if notes:
            (destination / NOTES).write_text(json.dumps(notes), encoding="utf-8")

    def _importance(self, program: Program, ctx: Context) -> "Importance | None":
        from ..runtimes.gguf.importance import input_importance_by_gguf_name

        if self.data is None:
            return None
        with announcing_stage("importance matrix", "then writing"):
            return input_importance_by_gguf_name(program, ctx.rows(self.data))

    def weight_bytes(self, weights: Weights) -> int:
        """Vectors are float32."""
        return weights.stored(lambda w: 4 * w.numel if len(w.shape) == 1 else self._bytes_of_matrix(w))

    def _bytes_of_matrix(self, weight: Weight) -> float:
        """Matrices without codes of four bits are q8_0 where the type has such codes."""
        kind: str = self.type
        if kind in FILE_TYPES:
            kind = type_of_matrix(
                kind, weight.shape[-1], "head" if weight.head else "table" if weight.table else "layer"
            )
        elif kind in ("q4_0", "q4_1"):
            codes = weight.grid is not None and weight.grid[0] <= 4 and weight.grid[1] % 32 == 0
            kind = kind if codes else "q8_0"
        return TYPES[kind].bytes_per_number * weight.numel

    def files(self, weights: Weights) -> tuple[int, dict[str, float]]:
        tokens = max((w.shape[0] for w in weights.tensors if w.table), default=0)
        packing = "grid" if self.type in FILE_TYPES else "pack"
        return self.weight_bytes(weights) + _TOKEN * tokens + weights.sidecars, {packing: weights.numbers_to_pack}

    def check_requirements(self, ctx: Context) -> None:
        from ..models.checkpoints.meta_init import without_storage

        if self.type in FILE_TYPES:
            check_modules(("llama_cpp",), "llama", f"the target `gguf` with `type: {self.type}`")
        with without_storage():
            refuse_unknown_architecture(ctx.origin.build())

    def foresee(self, ctx: Context) -> None:
        from ..models.checkpoints.meta_init import without_storage

        with without_storage():
            refuse_gguf_unwritable_config(ctx.origin.build())

    def foresee_shapes(self, skeleton: Skeleton, ctx: Context) -> None:
        from ..models.checkpoints.meta_init import without_storage
        from ..runtimes.gguf.families import FAMILIES
        from ..runtimes.gguf.shapes import embedding_scale, refuse_unsupported_forecast

        family = FAMILIES.get(skeleton.model_type)
        if family is None or not (family.of.square or family.of.scaled):
            return
        with without_storage():
            scale = embedding_scale(ctx.origin.build()) if family.of.scaled else None
        refuse_unsupported_forecast(skeleton, scale)

    def lacks(self, earlier_passes: Sequence[Pass]) -> Diagnostic | None:
        from ..runtimes.gguf.four_bits import KINDS, no_matrix_on_grid_diagnostic, quantizes_to_block_grid

        return (
            None
            if self.type not in KINDS or any(map(quantizes_to_block_grid, earlier_passes))
            else no_matrix_on_grid_diagnostic(self.type)
        )

    def forms(self) -> tuple[Form, ...]:
        from ..runtimes.gguf.stored_weights import with_weights_of_gguf

        as_stored, reason = (with_weights_of_gguf, _REASON_OF_STORED) if self.type in FILE_TYPES else (None, _REASON)
        rounds = partial(rounding_tolerance, self.type)
        native_form = Form(FOLDER, "engine", rounds=rounds, as_stored=as_stored, reason=reason, steps=32)
        if find_spec("llama_cpp") is None:
            return (native_form,)
        in_llama, reason = partial(rounding_tolerance_in_llama, self.type), "llama.cpp: " + reason
        return (
            native_form,
            Form(FOLDER, "llama", rounds=in_llama, as_stored=as_stored, reason=reason, generates=False),
        )

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        from ..runtimes.gguf.engine import FILE
        from ..runtimes.gguf.facts import read_facts
        from ..runtimes.gguf.reading import read_gguf

        read_facts(read_gguf(folder / FILE))

    @classmethod
    def tensors(cls, file: Path) -> "Iterator[tuple[str, torch.Tensor]]":
        from ..runtimes.gguf.engine import FILE
        from ..runtimes.gguf.reading import read_gguf

        if file.name != FILE:
            yield from super().tensors(file)
        else:
            stored = read_gguf(file)
            yield from ((entry, stored.read_tensor(entry)) for entry in stored.entries)

    @classmethod
    def open(cls, folder: Path, load_request: LoadRequest) -> tuple[Any, None]:
        from ..runtimes.gguf.engine import open_gguf

        check_modules(cls.requires, cls.extra, "an artifact of the target `gguf`")
        if load_request.dtype is not None or str(load_request.device or "cpu").partition(":")[0] != "cpu":
            raise other_kind(
                f"{folder} is computed as it is, on the CPU", help="load it without dtype or device"
            ).rejection()
        return open_gguf(folder), None

    @classmethod
    def summary(cls, folder: Path) -> Any:
        from ..runtimes.gguf.summary import summarise_gguf

        check_modules(cls.requires, cls.extra, "an artifact of the target `gguf`")
        return summarise_gguf(folder)


def refuse_unknown_architecture(model: "nn.Module") -> None:
    """Raise Reject (cannot-write-gguf) of a model that is no language model, or of a type that has no GGUF here."""
    from ..runtimes.gguf.families import family_of
    from ..runtimes.gguf.refusal import INSTEAD, cannot_write_gguf

    if not hasattr(model, "config") or not hasattr(model, "lm_head"):
        kind = type(model).__name__
        raise cannot_write_gguf(f"{kind} is no causal language model with a head", help=INSTEAD).rejection()
    family_of(model.config)


def refuse_gguf_unwritable_config(model: "nn.Module") -> None:
    """Raise Reject of a model whose config alone says that no GGUF is written of it."""
    from ..runtimes.gguf.families import refuse_unsupported_config
    from ..runtimes.gguf.shapes import refuse_weights_without_gguf_name

    refuse_unknown_architecture(model)
    refuse_unsupported_config(model.config)
    refuse_weights_without_gguf_name(model)
