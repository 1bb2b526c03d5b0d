"""A front of choices that share their weights: written once, with the list of points."""

from pathlib import Path

import torch

from ...dsl.checker.values import Bytes
from ...dsl.syntax.diagnostics import Fault
from ..artifacts.stock import stock_config
from ..artifacts.verify import verify_forms
from ..ir.outcome import Front, Outcome
from ..models.checkpoints.model_folder import origin_of_folder
from ..plugin.context import Context
from ..plugin.interfaces import param
from ..plugin.target import Form, Target
from ..transforms.supernet import shared_weights
from ..transforms.supernet.family import Family as Choices
from . import hf

no_shared_weights = Fault(
    "no-shared-weights",
    "A front is to be written with weights that its points share, and they share none that can be written once.\n\n"
    "Points are choices of one family where a search over it found them, and the family's model has a config.",
)


class Family(Target):
    """A front of choices that share their weights: written once, with the list of points.

    `shared/model/` is the family's whole model, which plain transformers reads, `family.json` the elastic dimensions,
    the order in which items go, and the points of the front, `family.safetensors` adapters. `effc pick ARTIFACT --point
    NAME`, or with limits, cuts a model out as an artifact of its own, without training, reopened and compared before it
    is in place. While it is written every point is cut out of the files once, and its weights compared.

    Source: own.
    Example: family("sizes")
    """

    result_kinds = ("front",)
    does = {"shared": "is one model that points are cut out of: transformers builds it and maps its safetensors"}
    use = "take a model out of it: `effc pick ARTIFACT --point NAME`, or with limits such as `--params 1.6M`"

    shard: Bytes = param("Largest size of one weights file.", default=Bytes(5_000_000_000))

    def write(self, outcome: Outcome, destination: Path, ctx: Context) -> None:
        assert isinstance(outcome, Front), f"{outcome.kind} has no points"
        choices = {point.name: point.choice for point in outcome.points}
        if outcome.results is None or not all(choices.values()) or len({p.key for p in outcome.points}) > 1:
            raise no_shared_weights(
                "the points are results of steps, each with weights of its own",
                help='write `front("sizes")`, or search a family: `supernet.elastic`, then `search.*`',
            ).rejection()
        family = outcome.results.load_outcome(outcome.points[0].key)
        assert isinstance(family, Choices), f"points are choices of {family.kind}"
        config, reasons = stock_config(family.program.model)
        if reasons:
            raise no_shared_weights(
                f"the family's whole model is of no config: {reasons[0]}", help='write `front("sizes")` instead'
            ).rejection()
        family.program.to_cpu()
        (destination / "shared").mkdir()
        hf.write_stock_checkpoint(family.program, config, destination / "shared", ctx, self.shard.value)
        shared_weights.write_family_without_weights(
            family, {name: choice for name, choice in choices.items() if choice}, destination
        )
        verify_forms(destination, family.program.model, [Form(shared_weights.WEIGHTS, "plain")], seed=ctx.seed)
        self._assert_saved_members_equal(outcome, destination, ctx)

    def _assert_saved_members_equal(self, outcome: Front, destination: Path, ctx: Context) -> None:
        """Every point as it is cut out of the files, with the same out of memory."""
        dtype = ctx.origin.dtype
        for name, program in outcome.members():
            origin = origin_of_folder(
                destination / shared_weights.WEIGHTS, str(destination / shared_weights.WEIGHTS), dtype, ctx.settings
            )
            stored, expected = (
                shared_weights.load_and_cut_program_of_point(destination, name, origin).model.state_dict(),
                program.model.state_dict(),
            )
            assert stored.keys() == expected.keys(), f"point {name} has other tensors"
            differing = [key for key, value in stored.items() if not torch.equal(value, expected[key])]
            assert not differing, f"point {name} differs in {differing[0]}"

    def forms_of(self, outcome: Outcome) -> tuple[Form, ...]:
        return ()
