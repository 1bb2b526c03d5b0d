"""A client's place: the model that it holds and the rows that are its own."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ....dsl.checker.recipe import Invocation, Recipe
from ....dsl.checker.values import value_from_json
from ....dsl.syntax.source import Source
from ...core.settings import Settings
from ...driver.models import open_model, resolve_origin
from ...plugin.context import Context
from ...plugin.registry import Registry
from .bounds import Bounds
from .client import Learner, Participant
from .declaration import Declaration, base_hash, refuse_other_base
from .partition import partition_rows, split_train_and_validation

if TYPE_CHECKING:
    from .rows import Rows
    from .search import RetrievalClient
    from .slots import Slots


class ClientHost:
    """One machine: a model's folder and a folder that data paths start from. `participants` share the model.

    local_data    the data there are one client's alone: it learns from all of them, and nothing is divided
    """

    def __init__(
        self,
        declaration: Declaration,
        model_folder: Path,
        data_folder: Path,
        settings: Settings,
        is_one_clients_data: bool = False,
    ):
        self.declared, self.model, self.data = declaration, model_folder, data_folder
        self.settings, self.local_data = settings, is_one_clients_data
        self.base = base_hash(model_folder, settings.cache_dir)

    def check_base_model(self) -> None:
        """Reject where the folder holds another model."""
        refuse_other_base(self.declared, self.model, self.settings.cache_dir)

    @contextmanager
    def participants(self, client_ids: list[int]) -> "Iterator[Sequence[Participant | RetrievalClient]]":
        """Clients that answer messages, over one model; over one of each size where they train sub-networks."""
        rows, declared = self._load_rows_by_source(), self.declared
        if declared.trains == "index":
            yield self._retrieval_clients(client_ids, rows)
            return
        sizes_by_client = {client: declared.assignable_size_indices(client) for client in client_ids}
        with ExitStack() as open_slots:
            slots = {}
            for size in sorted({size for sizes in sizes_by_client.values() for size in sizes}):
                model = open_model(str(self.model), self.settings).model
                slots[size] = open_slots.enter_context(cut_model_and_attach_slots(model, declared, size))
            seats = []
            for client in client_ids:
                learners = {size: self._make_learner(client, rows, slots[size]) for size in sizes_by_client[client]}
                first, sizes = learners[sizes_by_client[client][0]], learners if declared.sizes else {}
                bounds = Bounds(declared.full, declared.clients, declared.deadline)
                seats.append(Participant(client, first, sizes, bounds))
            yield seats

    def _retrieval_clients(self, client_ids: list[int], rows_by_source: "list[Rows]") -> "list[RetrievalClient]":
        """Clients with vectors of their questions and documents, the halves of rows of `texts` with two fields.

        Whose question is whose, and whose document, is divided apart: an answer may lie with another client.
        """
        from ...models.rows.encoder_states import pooled_state_batches, resolve_pooling_name
        from .search import RetrievalClient

        model, declared = open_model(str(self.model), self.settings).model, self.declared
        pooling = resolve_pooling_name(self.model, "auto")
        pairs = []
        for part in rows_by_source:
            vectors = torch.cat([s.pooled.double() for s in pooled_state_batches(model, part.ids, pooling)])
            pairs.append(torch.nn.functional.normalize(vectors, dim=-1).float().cpu().numpy())
        halves = [len(p) // 2 for p in pairs]
        questions_all = np.concatenate([p[:n] for p, n in zip(pairs, halves, strict=True)])
        known = np.concatenate([p[n:] for p, n in zip(pairs, halves, strict=True)])
        if self.local_data:
            numbers = np.arange(len(known))
            partners = {k: np.stack([np.full(len(known), k), numbers], axis=1) for k in client_ids}
            return [RetrievalClient(k, self.base, questions_all, known, partners[k], declared.top) for k in client_ids]
        questions, documents = (concatenated_row_indices_by_client(declared, halves, declared.seed + n) for n in (0, 1))
        owner_of = {at: (k, n) for k, row_numbers in enumerate(documents) for n, at in enumerate(row_numbers)}
        partners = {k: np.array([owner_of[at] for at in questions[k]]) for k in client_ids}
        return [
            RetrievalClient(k, self.base, questions_all[questions[k]], known[documents[k]], partners[k], declared.top)
            for k in client_ids
        ]

    def _load_rows_by_source(self) -> "list[Rows]":
        """Rows of every data set."""
        from .rows import rows_of

        calls = {
            d.name: Invocation(d.word, {k: value_from_json(v) for k, v in d.args.items()}) for d in self.declared.data
        }
        recipe = Recipe(Source("federation.json", ""), "", {}, {}, calls, {}, {})
        origin = resolve_origin(str(self.model), self.settings)
        context = Context(self.settings, recipe, self.data, Registry(), origin, self.settings.cache_dir)
        return [rows_of(d.name, context) for d in self.declared.data]

    def _make_learner(self, client: int, rows_by_source: "list[Rows]", slots: "Slots") -> Learner:
        from .language import CausalLmLearner, Local
        from .rows import concatenate_rows
        from .stream import Stream

        declared = self.declared
        private = declared.protects == "rows" and declared.clip > 0
        local = Local(declared.steps, declared.batch, declared.lr, anchor=declared.anchor)
        if private:
            local = replace(local, clip=declared.clip, noise=declared.noise)
        if declared.stream:
            tasks = rows_by_source if self.local_data else rows_by_client_and_source(declared, rows_by_source)[client]
            return Stream(slots, [self._split_train_and_validation(task) for task in tasks], local, self.base)
        mine = concatenate_rows(rows_by_source) if self.local_data else rows_by_client(declared, rows_by_source)[client]
        return CausalLmLearner(slots, *self._split_train_and_validation(mine), local, self.base)

    def _split_train_and_validation(self, rows: "Rows") -> "tuple[Rows, Rows]":
        """Rows to learn from, and rows to judge by."""
        learn, validation = (
            split_train_and_validation(len(rows), self.declared.hold, self.declared.seed) if len(rows) else ([], [])
        )
        return rows.select(learn), rows.select(validation)


def source_and_row_by_client(declaration: Declaration, row_counts: list[int], seed: int) -> list[list[tuple[int, int]]]:
    """For every client (data set, row), of data sets of so many rows."""
    return partition_rows(row_counts, declaration.clients, declaration.split, declaration.beta, seed)


def rows_by_client_and_source(declaration: Declaration, rows_by_source: "list[Rows]") -> "list[list[Rows]]":
    """For every client its rows of every data set, none of some perhaps."""
    parts = source_and_row_by_client(declaration, [len(r) for r in rows_by_source], declaration.seed)
    return [
        [r.select([row for n, row in part if n == number]) for number, r in enumerate(rows_by_source)] for part in parts
    ]


def rows_by_client(declaration: Declaration, rows_by_source: "list[Rows]") -> "list[Rows]":
    """The rows of every client."""
    from .rows import concatenate_rows

    if (
        len({r.ids.shape[1] for r in rows_by_source}) > 1
    ):  # data sets of different length stay apart: a client has one of them
        return [
            next(task for task in tasks if len(task))
            for tasks in rows_by_client_and_source(declaration, rows_by_source)
        ]
    joined_rows, sizes = concatenate_rows(rows_by_source), [len(r) for r in rows_by_source]
    return [
        joined_rows.select(part) for part in concatenated_row_indices_by_client(declaration, sizes, declaration.seed)
    ]


def concatenated_row_indices_by_client(declaration: Declaration, row_counts: list[int], seed: int) -> list[list[int]]:
    """For every client numbers of records, all data sets behind one another."""
    starts = [sum(row_counts[:n]) for n in range(len(row_counts))]
    return [
        [starts[number] + row for number, row in part]
        for part in source_and_row_by_client(declaration, row_counts, seed)
    ]


@contextmanager
def cut_model_and_attach_slots(model: Any, declaration: Declaration, sub_network_index: int = -1) -> "Iterator[Slots]":
    """Slots of a federation's states in a model; `sub_network_index` is that of the sub-network which it
    becomes, -1 for none."""
    from .slots import AllWeights, ClassifierSlots, Edited, LowRankSlots, SoftPrompt

    full = declaration.full
    if sub_network_index >= 0:
        from ...ir.capture.capture import capture
        from .sizes import cut_to_sub_network

        cut_to_sub_network(capture(model), declaration.sizes[sub_network_index])
        full = declaration.sizes[sub_network_index].sub_network_shapes(full)
    if declaration.trains == "lora":
        with LowRankSlots.attached(model, full, declaration.alpha) as slots:
            yield ClassifierSlots(slots, full)
    elif declaration.trains == "reft":
        yield ClassifierSlots(Edited(model, full), full)
    else:
        yield {"prompt": SoftPrompt, "full": AllWeights}[declaration.trains](model, full)
