"""A client's place: the model that it holds and the rows that are its own."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.recipe import Invocation, Recipe
from ...dsl.source import Source
from ...dsl.values import from_json
from ..models import open_model, origin_of
from ..words.context import Context, Settings
from ..words.shelf import Shelf
from .client import Learner, Participant
from .declaration import Declaration, base_hash, check_base
from .partition import divided, held_back

if TYPE_CHECKING:
    from .rows import Rows
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
        check_base(self.declared, self.model, self.settings.cache_dir)

    @contextmanager
    def seats(self, clients: list[int]) -> Iterator[list[Participant]]:
        """Clients that answer messages, over one model; over one of each size where they train sub-networks."""
        rows, declared = self._rows(), self.declared
        wanted = {client: declared.size_of[client] if declared.sizes else -1 for client in clients}
        with ExitStack() as open_slots:
            slots = {}
            for size in sorted(set(wanted.values())):
                model = open_model(str(self.model), self.settings).model
                slots[size] = open_slots.enter_context(slots_on(model, declared, size))
            yield [Participant(client, self._learner(client, rows, slots[wanted[client]])) for client in clients]

    def _rows(self) -> "list[Rows]":
        """Rows of every data set."""
        from .rows import rows_of

        calls = {d.name: Invocation(d.word, {k: from_json(v) for k, v in d.args.items()}) for d in self.declared.data}
        recipe = Recipe(Source("federation.json", ""), "", {}, {}, calls, {}, {})
        origin = origin_of(str(self.model), self.settings)
        context = Context(self.settings, recipe, self.data, Shelf(), origin, self.settings.cache_dir)
        return [rows_of(d.name, context) for d in self.declared.data]

    def _learner(self, client: int, rows: "list[Rows]", slots: "Slots") -> Learner:
        from .language import Language, Local
        from .rows import joined

        declared = self.declared
        mine = joined(rows) if self.own else parts_of(declared, rows)[client]
        learn, held = held_back(len(mine), declared.hold, declared.seed)
        private = declared.protects == "rows" and declared.clip > 0
        local = Local(declared.steps, declared.batch, declared.lr)
        if private:
            local = Local(declared.steps, declared.batch, declared.lr, declared.clip, declared.noise)
        return Language(slots, mine.select(learn), mine.select(held), local, self.base)


def parts_of(declared: Declaration, rows: "list[Rows]") -> "list[Rows]":
    """The rows of every client."""
    from .rows import joined

    sizes = [len(r) for r in rows]
    found = divided(sizes, declared.clients, declared.split, declared.beta, declared.seed)  # type: ignore[arg-type]
    whole = joined(rows) if len({r.ids.shape[1] for r in rows}) == 1 else None
    if whole is None:  # rows of data sets of different length stay apart: every client has one of them
        return [rows[part[0][0]].select([row for _, row in part]) for part in found]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    return [whole.select([starts[number] + row for number, row in part]) for part in found]


@contextmanager
def slots_on(model: Any, declared: Declaration, size: int = -1) -> "Iterator[Slots]":
    """Where the states of a federation go in a model; `size` names the sub-network that it becomes, -1 for none."""
    from .slots import Edited, Headed, LowRank, SoftPrompt, Whole

    full = declared.full
    if size >= 0:
        from ..capture.capture import capture
        from .sizes import cut

        cut(capture(model), declared.sizes[size])
        full = declared.sizes[size].shapes(full)
    if declared.trains == "lora":
        with LowRank.on(model, full, declared.alpha) as slots:
            yield Headed(slots, full)
    elif declared.trains == "reft":
        yield Headed(Edited(model, full), full)
    else:
        yield {"prompt": SoftPrompt, "full": Whole}[declared.trains](model, full)
