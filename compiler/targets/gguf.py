"""A GGUF file, as llama.cpp and what is built on it read models."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...dsl.syntax.diagnostics import Diagnostic, Reject
from ..artifacts.artifact import NOTES
from ..artifacts.load import other_kind
from ..core.environment import check_modules
from ..ir.program import Program
from ..models.checkpoints.pretrained import pretrained
from ..models.checkpoints.sidecar_files import copy_sidecar_files
from ..plugin.context import Context
from ..plugin.interfaces import Pass, param
from ..plugin.target import Form, LoadRequest, Target

if TYPE_CHECKING:
    import torch
    from torch import nn

FOLDER = "gguf"
# Of root mean squares: f32 sums in another order, the others round weights.
SHARES = {"f32": 1e-3, "f16": 0.01, "bf16": 0.06, "q8_0": 0.1, "q4_0": 0.1, "q4_1": 0.1}
_REASON = "weights are rounded as the file's type has them, and sums are taken in another order"


def share_of(kind: str, model: "nn.Module") -> float:
    import torch

    halves = any(p.dtype != torch.float32 for p in model.parameters())
    return max(SHARES[kind], SHARES["bf16"] if halves else 0.0)


def share_in_llama(kind: str, model: "nn.Module") -> float:
    """llama.cpp looks GELU up in a table of halves."""
    from ..runtimes.gguf.families import FAMILIES

    table = FAMILIES[pretrained(model).config.model_type].of.activation == "gelu"
    return max(share_of(kind, model), SHARES["f16"] if table else 0.0)


class Gguf(Target):
    """A GGUF file, as llama.cpp and what is built on it read models.

    `gguf/model.gguf` has the pruned shapes, the tokenizer and the chat template. Llama, Mistral, Qwen2 and 3, Gemma 1
    to 3, Phi 1 to 4, StableLM, GLM-4, Granite, OLMo 2, SmolLM3, Cohere 1 and 2 and StarCoder2 whose layers are all
    alike are written under their own architecture; Llamas and Mistrals whose layers differ in width or heads, or lack
    their attention or MLP, as `deci`, which llama.cpp reads too. Before a compile succeeds a fresh process computes
    what the file says, reading nothing else, and llama.cpp does, tokens of texts too, where `llama-cpp-python` is
    installed. What llama.cpp can't hold, or would get wrong without a word, is refused by name.

    Source: the GGUF specification of ggml; tensor names and `deci` of llama.cpp.
    Example: gguf("llamacpp", type: f16)
    """

    extra: ClassVar[str] = "gguf"
    requires: ClassVar[tuple[str, ...]] = ("gguf",)
    on_cpu = True
    loads = {"gguf": '`gguf/model.gguf` is for llama.cpp and its kin; `effc.load(".")` and `effc run .` read it too.'}
    marks = {"gguf": "model.gguf"}
    does = {"gguf": "counts and places are held against the file, then effc's engine computes with its tensors"}

    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"] = param(
        "Numbers of matrices; `q8_0` has 8 bits and a scale for each 32 of a row, `q4_0` and `q4_1` the codes that "
        "`quantize.*` left in groups of 32, and q8_0 where it left none.",
        default="f16",
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
        from ..runtimes.gguf.writing import write_gguf

        check_modules(self.requires, self.extra, "the target `gguf`")
        refuse_gguf_unwritable_config(program.model)
        folder = destination / FOLDER
        folder.mkdir()
        notes = write_gguf(program.model, folder, self.type, ctx.origin.tokenizer())
        copy_sidecar_files(program.model, ctx.origin, folder)
        if notes:
            (destination / NOTES).write_text(json.dumps(notes), encoding="utf-8")

    def foresee(self, ctx: Context) -> None:
        from ..models.checkpoints.meta_init import without_storage

        check_modules(self.requires, self.extra, "the target `gguf`")
        with without_storage():
            refuse_gguf_unwritable_config(ctx.origin.build())

    def lacks(self, earlier_passes: Sequence[Pass]) -> Diagnostic | None:
        from ..runtimes.gguf.four_bits import KINDS, makes_codes, no_codes

        return None if self.type not in KINDS or any(map(makes_codes, earlier_passes)) else no_codes(self.type)

    def forms(self) -> tuple[Form, ...]:
        rounds = partial(share_of, self.type)
        native_form = Form(FOLDER, "engine", rounds=rounds, reason=_REASON, steps=32)
        if find_spec("llama_cpp") is None:
            return (native_form,)
        in_llama = partial(share_in_llama, self.type)
        return (native_form, Form(FOLDER, "llama", rounds=in_llama, reason="llama.cpp: " + _REASON, generates=False))

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
            raise Reject(
                other_kind(f"{folder} is computed as it is, on the CPU", help="load it without dtype or device")
            )
        return open_gguf(folder), None

    @classmethod
    def summary(cls, folder: Path) -> Any:
        from ..runtimes.gguf.summary import summarise_gguf

        check_modules(cls.requires, cls.extra, "an artifact of the target `gguf`")
        return summarise_gguf(folder)


def refuse_gguf_unwritable_config(model: "nn.Module") -> None:
    """Raise Reject of a model whose config alone says that no GGUF is written of it."""
    from ..runtimes.gguf.families import refuse_config
    from ..runtimes.gguf.refusal import INSTEAD, cannot_write_gguf
    from ..runtimes.gguf.shapes import refuse_names

    if not hasattr(model, "config") or not hasattr(model, "lm_head"):
        kind = type(model).__name__
        raise Reject(cannot_write_gguf(f"{kind} is no causal language model with a head", help=INSTEAD))
    refuse_config(model.config)
    refuse_names(model)
