"""Adapters as peft writes them, beside the model that they were trained on."""

from pathlib import Path
from typing import Any

from ...dsl.checker.values import Bytes
from ...dsl.syntax.diagnostics import Fault
from ..artifacts.stock import stock_config
from ..core.environment import check_modules
from ..ir.outcome import Outcome
from ..models.checkpoints.sidecar_files import copy_sidecar_files
from ..plugin.context import Context
from ..plugin.interfaces import param
from ..plugin.target import Form, LoadRequest, Target
from ..transforms.training.unmerged import UnmergedAdapters
from . import hf

shaped_base = Fault(
    "shaped-base",
    "Adapters are to be written for peft of a model that plain transformers can't load.\n\n"
    "Its layers have widths of their own, which no config can say. Merge the adapters instead.",
)

ADAPTER, BASE = "adapter", "base"


class Peft(Target):
    """Adapters as peft writes them, beside the model that they were trained on.

    `adapter/` is a stock folder: `PeftModel.from_pretrained(base, "adapter")` opens it, and so does whatever else knows
    peft. `base/` holds the model beneath, as plain transformers loads it; several adapters of one model need it once.
    The adapter's config names it as `base`: `AutoPeftModelForCausalLM` finds it from the artifact's folder alone.
    A model whose layers have widths of their own has no such folder, so its adapters are merged instead.

    Source: LoRA (Hu et al. 2021, arXiv 2106.09685); the folder is peft's own format.
    Example: peft("adapter")
    """

    result_kinds = ("adapters",)
    loads = {
        "adapter": "`adapter/` are adapters on `base/`: `PeftModel.from_pretrained(AutoModelForCausalLM."
        'from_pretrained("base"), "adapter")`, or `effc.load(".")`.'
    }
    marks = {"adapter": "adapter_config.json"}
    does = {
        "adapter": "low-rank adapters are read by a closed form and put onto `base/`",
        "base": "is the model of the adapters beside it: transformers builds it and maps its safetensors",
    }
    extra = "tune"
    requires = ("peft",)

    shard: Bytes = param("Largest size of one weights file of the base.", default=Bytes(5_000_000_000))

    def write(self, outcome: Outcome, destination: Path, ctx: Context) -> None:
        check_modules(self.requires, self.extra, "the target `peft`")
        assert isinstance(outcome, UnmergedAdapters), f"adapters, and not: {outcome.kind}"
        program = outcome.program
        program.to_cpu()
        config, reasons = stock_config(program.model)
        if reasons:
            raise shaped_base(
                f"no config has the shapes of the model beneath the adapters: {reasons[0]}",
                help="leave `merge: false` out, and emit `hf`",
            ).rejection()
        hf.write_stock_checkpoint(program, config, destination, ctx, self.shard.value, BASE)
        outcome.save_as_peft(destination / ADAPTER, BASE)
        copy_sidecar_files(program.model, ctx.origin, destination / ADAPTER)

    def forms(self) -> tuple[Form, ...]:
        return (Form(ADAPTER, "peft"),)

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        from ..artifacts.adapter import check_adapter_folder
        from ..artifacts.checkpoint_folders import check_checkpoint_folder

        check_adapter_folder(folder)
        check_checkpoint_folder(folder.parent / BASE)

    @classmethod
    def open(cls, folder: Path, load_request: LoadRequest) -> tuple[Any, None]:
        from ..artifacts.adapter import load_peft_adapters
        from ..artifacts.model_loading import load_stock_model

        check_modules(cls.requires, cls.extra, "an artifact of the target `peft`")
        return load_peft_adapters(folder, load_stock_model(folder.parent / BASE, load_request.dtype)), None
