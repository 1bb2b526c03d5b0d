"""A front of models in one artifact, from which `effc pick` takes one."""

from pathlib import Path

from ...dsl.checker.values import Bytes
from ..artifacts.load import POINTS
from ..ir import outcome as kinds
from ..ir.outcome import Outcome
from ..plugin.context import Context
from ..plugin.interfaces import param
from ..plugin.target import Form, Target
from . import hf


class Front(Target):
    """A front of models in one artifact, from which `effc pick` takes one.

    `points/NAME/` holds the model of each point: `model/` where its shapes are those of some config, which plain
    transformers reads, else `compact/`, which `effc.load` reads. `effc pick ARTIFACT --params 1.6M` (or `--point NAME`)
    copies one out as an artifact of its own, reopened and compared before it is in place.

    Source: own.
    Example: front("sizes")
    """

    result_kinds = ("front",)
    does = {"points": "holds several results, each with its own forms: `effc pick` copies one"}
    use = "take a model out of it: `effc pick ARTIFACT --point NAME`, or with limits such as `--params 1.6M`"

    shard: Bytes = param("Largest size of one weights file.", default=Bytes(5_000_000_000))

    def write(self, outcome: Outcome, destination: Path, ctx: Context) -> None:
        for name, program in outcome.members():
            folder = destination / POINTS / name
            folder.mkdir(parents=True)
            program.to_cpu()
            hf.write_stock_or_compact(program, folder, ctx, self.shard.value)

    def forms_of(self, outcome: Outcome) -> tuple[Form, ...]:
        assert isinstance(outcome, kinds.Front), f"a front, and not: {outcome.kind}"
        return tuple(
            form
            for name in outcome.names
            for form in (
                Form(f"{POINTS}/{name}/model", "plain", member=name),
                Form(f"{POINTS}/{name}/compact", "effc", member=name),
            )
        )
