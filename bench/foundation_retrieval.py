"""Retrieval over clients' documents, with a limit to what a client sends for a question, beside one index over all.

The limit is set at the clients: each sends so many scores and numbers at most, and the server merges what came.
"""

import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from effc.compiler.apps.federation.client_host import ClientHost
from effc.compiler.apps.federation.declaration import make_federation
from effc.compiler.apps.federation.grid import Answer, LocalGrid, Message
from effc.compiler.apps.federation.search import RetrievalClient, top_scores_and_documents
from effc.compiler.core.settings import Settings

from bench.reviews import compile_recipe
from bench.row_store import RowStore

TOP, LIMITS, RANKS = 10, (10, 5, 3, 2, 1), (1, 5, 10)
LAYOUTS = {"dealt out": "even", "a subject at two clients": "blocks"}
RECIPE = """effspec 1
model base = hf("{model}")
data questions = texts("questions-0.jsonl", fields: ["question", "document"], length: 48)
pipeline p(base) {{}}
emit p {{ flower("index", data: questions, clients: 8, trains: index, strategy: search, top: {top}) }}
"""


class Recorder:
    """A client, and owners and numbers of the documents that it got for its questions, the best first: [q, k] each."""

    def __init__(self, client: RetrievalClient):
        self.client = client
        self.owners = self.numbers = np.zeros((0, 0), np.int64)

    def __call__(self, message: Message, memory: dict[str, Any]) -> Answer:
        if message.kind == "judge":
            self.owners, self.numbers = (message.arrays["others"][name] for name in ("owners", "numbers"))
        return self.client(message, memory)


def measure_retrieval(folder: Path, embedder: Path, seeds: list[int], store: RowStore) -> None:
    """Add rows of all layouts, limits and seeds that the store lacks."""
    for layout in LAYOUTS:
        for seed in seeds:
            if any((row.get("layout"), row["seed"]) == (layout, seed) for row in store.rows):
                continue
            began = time.process_time()
            path, declared = compile_recipe(folder, "index", RECIPE.format(model=embedder, top=TOP), 0)
            (data,) = declared.data
            data = replace(data, args={**data.args, "path": f"questions-{seed}.jsonl"})
            declared = declared.with_changes(seed=seed, split=LAYOUTS[layout], data=(data,))
            settings = Settings(folder / "cache", seed=seed, threads=1)
            with ClientHost(declared, path / declared.folder, folder, settings).participants([*range(8)]) as clients:
                arms = {"one index": one_index(clients), "alone": alone(clients)}
                arms |= {f"limit {limit}": federated(declared, clients, limit) for limit in LIMITS}
            store.add(
                {
                    "task": "retrieval",
                    "layout": layout,
                    "seed": seed,
                    "arms": arms,
                    "seconds": time.process_time() - began,
                }
            )
            print(f"retrieval, {layout}, seed {seed}", flush=True)


def recalls(clients, ranks_of_answers: list[np.ndarray]) -> dict[str, float]:
    """Shares of questions whose answer is among the best; arrays of bool [q, k] by client, k as many as there are."""
    return {f"recall@{k}": fmean(bool(hit[:k].any()) for hits in ranks_of_answers for hit in hits) for k in RANKS}


def one_index(clients) -> dict[str, Any]:
    """Recall of an index over the documents of all clients."""
    hits = [_index_order(clients, client) == _answers(clients, client)[:, None] for client in clients]
    return recalls(clients, hits) | {"of_one_index": 1.0}


def alone(clients) -> dict[str, Any]:
    """Recall where each client searches its documents alone."""
    hits, shares = [], []
    for client in clients:
        _, numbers = top_scores_and_documents(client.questions, client.documents, TOP)
        hits.append((client.partners[:, :1] == client.client) & (numbers == client.partners[:, 1:]))
        shares += _shares(_starts(clients)[client.client] + numbers, _index_order(clients, client))
    return recalls(clients, hits) | {"of_one_index": fmean(shares)}


def federated(declared, clients, limit: int) -> dict[str, Any]:
    """Recall of the federation, scores that go up for a question, and bytes both ways a question."""
    for client in clients:
        client.count = limit
    recorders = [Recorder(client) for client in clients]
    rounds = make_federation(declared, LocalGrid(recorders), None, lambda round_: None).run().rounds
    assert not any(round_.faults for round_ in rounds), rounds
    hits, shares = [], []
    for recorder in recorders:
        owners, numbers, partners = recorder.owners, recorder.numbers, recorder.client.partners
        hits.append((owners == partners[:, :1]) & (numbers == partners[:, 1:]))
        shares += _shares(_starts(clients)[owners] + numbers, _index_order(clients, recorder.client))
    questions = sum(len(client.questions) for client in clients)
    sizes = {name: sum(getattr(r, name) for r in rounds) / questions for name in ("bytes_up", "bytes_down")}
    return recalls(clients, hits) | {"of_one_index": fmean(shares), "scores": limit * len(clients)} | sizes


def _starts(clients) -> np.ndarray:
    """Number of each client's first document in the index over all."""
    return np.cumsum([0, *(len(client.documents) for client in clients)])


def _answers(clients, client: RetrievalClient) -> np.ndarray:
    return _starts(clients)[client.partners[:, 0]] + client.partners[:, 1]


def _index_order(clients, client: RetrievalClient) -> np.ndarray:
    """Numbers of the best documents of all for a client's questions, [q, TOP]."""
    documents = np.concatenate([c.documents for c in clients])
    return top_scores_and_documents(client.questions, documents, TOP)[1]


def _shares(retrieved: np.ndarray, best: np.ndarray) -> list[float]:
    """Share of the best documents that were retrieved, by question."""
    return [len({*a} & {*b}) / len(b) for a, b in zip(retrieved.tolist(), best.tolist(), strict=True)]
