"""Interventions as a folder of their own, beside the model that they were trained in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ...dsl.checker.rules import MissingStep, Problem
from ...dsl.syntax.diagnostics import Fault
from ..artifacts import reft
from ..artifacts.artifact import NOTES
from ..artifacts.checkpoint_folders import check_compact_folder
from ..artifacts.compact_config import KEY
from ..artifacts.load import load
from ..artifacts.manifest import NAME, no_artifact
from ..artifacts.model_loading import load_stock_model
from ..ir.layers.fast_mixers import use_mixer_kernels
from ..ir.layers.reft import interventions
from ..ir.program import Program
from ..ir.weights import model_weights_hash
from ..models.checkpoints.model_folder import read_model_config
from ..plugin.context import Context
from ..plugin.interfaces import param
from ..plugin.target import Form, LoadRequest, Target
from ..transforms.editing.interventions import insert_interventions, remove_interventions
from . import hf

nothing_to_write = Fault("nothing-to-write", "Interventions are to be written of a model that has none.")

_SHARD = 5_000_000_000


class Reft(Target):
    """Interventions as a folder of their own, beside the model that they were trained in.

    `reft/` has their numbers, a few kilobytes, the edits that put them in, and a hash of the base's tensors.
    `effc.load` finds the base where the recipe had it (the zoo, a folder, the hub's cache) or takes
    `effc.load(path, base="folder")`, puts them on, and refuses another model. `base/` holds the model where earlier
    steps changed it, or where nobody could have it otherwise.

    Source: own.
    Example: reft("edits")
    """

    loads = {
        "reft": '`reft/` has interventions alone: `effc.load(".")` puts them onto their base, '
        '`effc.load(".", base="folder")` onto one that you name (needs `pip install effc`).'
    }
    marks = {"reft": "reft.json"}
    does = {
        "reft": "effc finds the base that it names, compares its hash, and inserts effc's own modules",
        "base": "is the model of the interventions beside it: transformers builds it and maps its safetensors",
    }
    upon = True

    base: Literal["auto", "inside"] = param(
        "Whether the model beneath is copied: where it must be, or always.", default="auto"
    )

    def problems(self) -> Iterator[Problem]:
        yield MissingStep("reft.insert", "it writes the interventions that a step inserts")

    def emit(self, program: Program, destination: Path, ctx: Context) -> None:
        if not any(True for _ in interventions(program.model)):
            raise nothing_to_write(
                f"{type(program.model).__name__} has no interventions",
                help="put `reft.insert()` and `tune.reft()` before it, or emit `hf`",
            ).rejection()
        folder = destination / reft.FOLDER
        folder.mkdir()
        base = "" if self.base == "inside" else public_base_location(program, ctx)
        dtype = str(program.model.dtype).removeprefix("torch.")
        reft.write_reft_folder(program, folder, {"place": base, "config": ctx.origin.config, "dtype": dtype})
        if not base:
            _write_model_without_interventions(program, destination / reft.BASE, ctx)
        note = f"They belong to {base or 'the model in `base/`'}, whose tensors `reft/{reft.FILE}` knows by a hash."
        (destination / NOTES).write_text(json.dumps([note]), encoding="utf-8")

    def forms(self) -> tuple[Form, ...]:
        return (Form(reft.FOLDER, "effc"),)

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        reft.read_reft_base_and_edits(folder)
        base = folder.parent / reft.BASE / "compact"
        if base.is_dir():
            check_compact_folder(base)

    @classmethod
    def words(cls, folder: Path) -> Path:
        return reft.find_base_model_folder(folder)

    @classmethod
    def open(cls, folder: Path, load_request: LoadRequest) -> tuple[Any, None]:
        base = load_request.base
        if base is None or isinstance(base, (str, Path)):
            base_path = reft.find_base_model_folder(folder) if base is None else Path(base)
            if not any((base_path / name).is_file() for name in (NAME, "config.json")):
                raise no_artifact(
                    f"{base_path} holds no model to put interventions on", help="name the folder of the base"
                ).rejection()
            sealed = (base_path / NAME).is_file() or KEY in read_model_config(base_path / "config.json", str(base_path))
            base = load(base_path, kernels=False) if sealed else load_stock_model(base_path, None)
        reft.attach_interventions(base, folder)
        if load_request.kernels:
            use_mixer_kernels(base)
        return (base if load_request.dtype is None else base.to(load_request.dtype)).eval(), None


def public_base_location(program: Program, ctx: Context) -> str:
    """Public location of the base; "" where it is not the recipe's model, or has none."""
    origin = ctx.origin
    if origin.folder is None or model_weights_hash(origin.load()) != model_weights_hash(program.model):
        return ""
    word, _, arguments = origin.label.partition("(")
    name = arguments.rstrip(")").strip('"')
    if word == "zoo":
        return f"zoo:{name}"
    if word == "hf" and not name.startswith((".", "/", "~")):
        return f"hf:{name}"
    return str(origin.folder.resolve())


def _write_model_without_interventions(program: Program, folder: Path, ctx: Context) -> None:
    """The model without its interventions, which are put back in."""
    modules = {path.rpartition(".")[0]: module for path, module in interventions(program.model)}
    folder.mkdir()
    remove_interventions(program)
    hf.write_compact_checkpoint(program, folder, ctx, _SHARD)
    insert_interventions(program, modules)
