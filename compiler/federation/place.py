"""A client's place: the model that it holds and the rows that are its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.diagnostics import Reject
from ...dsl.recipe import Invocation, Recipe
from ...dsl.source import Source
from ...dsl.values import from_json
from ..opened import open_model, origin_of
from ..words.context import Context, Settings
from ..words.shelf import Shelf
from .client import Learner, Participant
from .declaration import Declaration, base_hash, other_base
from .partition import divided, held_back

if TYPE_CHECKING:
    from torch import Tensor

    from .slots import Slots


class Place:
    """One machine: a model's folder and a folder that data paths start from. `seats` share the model.

    own    the data there are one client's alone: it learns from all of them, and nothing is divided
    """

    def __init__(self, declared: Declaration, model: Path, data: Path, settings: Settings, own: bool = False):
        self.declared, self.model, self.data, self.settings, self.own = declared, model, data, settings, own
        self.base = base_hash(model, settings.cache_dir)

    def check_base(self) -> None:
        """Reject where the folder holds another model."""
        if self.base != self.declared.base:
            raise Reject(
                other_base(
                    f"{self.model} is {self.base[:12]}, the federation is of {self.declared.base[:12]}",
                    help="bring the folder of the model that was emitted with the federation",
                )
            )

    @contextmanager
    def seats(self, clients: list[int]) -> Iterator[list[Participant]]:
        """Clients that answer messages, over one model."""
        model = open_model(str(self.model), self.settings).model
        rows = self._rows()
        with slots_on(model, self.declared) as slots:
            yield [Participant(client, self._learner(client, rows, slots)) for client in clients]

    def _rows(self) -> "list[Tensor]":
        """Rows of every data set."""
        calls = {d.name: Invocation(d.word, {k: from_json(v) for k, v in d.args.items()}) for d in self.declared.data}
        recipe = Recipe(Source("federation.json", ""), "", {}, {}, calls, {}, {})
        origin = origin_of(str(self.model), self.settings)
        context = Context(self.settings, recipe, self.data, Shelf(), origin, self.settings.cache_dir)
        return [context.rows_by_name(d.name) for d in self.declared.data]

    def _learner(self, client: int, rows: "list[Tensor]", slots: "Slots") -> Learner:
        import torch

        from .language import Language, Local

        declared = self.declared
        if self.own:
            mine = torch.cat(rows)
        else:
            parts = divided(
                [len(r) for r in rows],
                declared.clients,
                declared.split,
                declared.beta,  # type: ignore
                declared.seed,
            )
            mine = torch.stack([rows[number][row] for number, row in parts[client]])
        learn, held = held_back(len(mine), declared.hold, declared.seed)
        local = Local(declared.steps, declared.batch, declared.lr)
        return Language(slots, mine[learn], mine[held], local, self.base)


@contextmanager
def slots_on(model: Any, declared: Declaration) -> "Iterator[Slots]":
    """Where the states of a federation go in a model."""
    from .slots import LowRank, SoftPrompt, Whole

    if declared.trains == "lora":
        with LowRank.on(model, declared.full, declared.alpha) as slots:
            yield slots
    else:
        yield {"prompt": SoftPrompt, "full": Whole}[declared.trains](model, declared.full)
