"""Adapters as peft writes them, beside the model that they were trained on."""

import json
from pathlib import Path

from ...dsl.diagnostics import Fault, Reject
from ..artifacts.artifact import NOTES
from ..artifacts.stock import stock_config
from ..ir.outcome import Outcome
from ..machine.environment import check_modules
from ..words.context import Context
from ..words.kinds import Form, Target
from . import hf

shaped_base = Fault(
    "shaped-base",
    "Adapters are to be written for peft of a model that plain transformers can't load.\n\n"
    "Its layers have widths of their own, which no config can say. Merge the adapters instead.")

ADAPTER, BASE = "adapter", "base"


class Peft(Target):
    """Adapters as peft writes them, beside the model that they were trained on.

    `adapter/` is a stock folder: `PeftModel.from_pretrained(base, "adapter")` opens it, and so does vLLM or a hub that
    knows peft. `base/` holds the model beneath where earlier steps changed it; otherwise the adapters belong to the
    recipe's own model, which is not copied. Only a few megabytes differ from one task to the next.

    Source: LoRA (Hu et al. 2021, arXiv 2106.09685); the folder is peft's own format.
    Example: peft("adapter")
    """

    holds = ("adapters",)
    extra = "tune"
    requires = ("peft",)

    def write(self, outcome: Outcome, into: Path, ctx: Context) -> None:
        check_modules(self.requires, self.extra, "the target `peft`")
        program = outcome.program
        if outcome.base:
            _, why = stock_config(program.model)
            if why:
                raise Reject(shaped_base(f"no config has the shapes of the model beneath the adapters: {why[0]}",
                                         help="leave `merge: false` out, and emit `hf`"))
            folder = into / BASE
            folder.mkdir()
            hf.write_checkpoint(program, folder, ctx)
        elif ctx.origin.folder is None:
            folder = into / BASE
            folder.mkdir()
            hf.write_checkpoint(program, folder, ctx)
        with outcome.applied():
            outcome.save(into / ADAPTER, base=f"../{BASE}" if (into / BASE).is_dir() else ctx.origin.label)
        if not (into / BASE).is_dir():
            (into / NOTES).write_text(json.dumps([f"The adapters belong to {ctx.origin.label}."]), encoding="utf-8")

    def forms(self) -> tuple[Form, ...]:
        return (Form(ADAPTER, "peft"),)
