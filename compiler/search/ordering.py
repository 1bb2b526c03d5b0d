"""Which items of a group go first, and what makes up for them: from weights alone, or from what flows through them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from ...dsl.skeleton import Group
from ...dsl.values import DataRef, MetricRef
from ..machine.memory import room_for
from . import importance
from .choice import Choice, Exact, Racing
from .reconstruct import Moments, Reconstruction, has_moments, module_of, readers

if TYPE_CHECKING:
    from ..ir.program import Program
    from ..words.context import Context
    from .loop import Search

Important = Callable[[Group], torch.Tensor]
Order = Literal["l1", "wanda", "obs"]


def choice_of(search: str, per: str) -> Choice:
    return Exact(per) if search == "exact" else Racing(per)


def ordering(program: "Program", ctx: "Context", search: "Search", groups: Sequence[Group], score: MetricRef,
             order: Order, repair: bool, data: DataRef | None = None) -> tuple[Important, Reconstruction | None]:
    """How items are ranked, and the repair of what reads them.

    What needs activations takes them from the model as it is, over the data's rows, or while the score is measured.
    """
    moments = Moments(ctx.workdir / "moments")
    if repair or order != "l1":
        modules = [module_of(m) for g in groups for m in readers(g) if has_moments(program.model, m)]
        search.collect(moments, modules, score, data, room_for(ctx.settings.max_memory))
    ranks: dict[str, Important] = {
        "l1": lambda group: importance.l1(program, group),
        "wanda": lambda group: importance.wanda(program, group, moments),
        "obs": lambda group: importance.obs(program, group, moments)}
    return ranks[order], Reconstruction(program, moments) if repair else None
