"""Partition of the rows among clients: a function of the numbers of rows, the clients and a seed."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ....dsl.syntax.diagnostics import Fault

Split = Literal["even", "blocks", "dirichlet", "distinct"]

empty_client = Fault(
    "empty-client", "A client of a federation would have no rows to learn from, or too few for one update."
)


def partition_rows(
    rows_per_data_set: Sequence[int], clients: int, split: Split, beta: float, seed: int
) -> list[list[tuple[int, int]]]:
    """Divide rows among clients, as (data set, row) in the order of the data; every row goes to one client.

    even        rows are dealt out in an order that the seed decides
    blocks      rows that lie together stay together: clients differ as parts of a text do
    dirichlet   clients' shares of every data set are drawn; the smaller `beta`, the more they differ
    distinct    every client has a data set of its own
    Raises Reject (empty-client) where a client has no row.
    """
    if split == "distinct":
        if len(rows_per_data_set) != clients:
            raise empty_client(
                f"`split: distinct` gives every client a data set of its own: {clients} clients, "
                f"{len(rows_per_data_set)} data sets",
                help=f"`clients: {len(rows_per_data_set)}`",
            ).rejection()
        parts = [[(k, row) for row in range(size)] for k, size in enumerate(rows_per_data_set)]
    else:
        parts = [[] for _ in range(clients)]
        draw = np.random.default_rng(seed)
        for number, size in enumerate(rows_per_data_set):
            order = np.arange(size) if split == "blocks" else draw.permutation(size)
            for k, rows in enumerate(np.split(order, _split_points(size, clients, split, beta, draw))):
                parts[k] += [(number, row) for row in sorted(rows.tolist())]
    empty = [k for k, rows in enumerate(parts) if not rows]
    if empty:
        raise empty_client(
            f"client {empty[0]} of {clients} would have none of the {sum(rows_per_data_set)} rows",
            help="give more data, ask for fewer clients, or raise `beta`"
            if split == "dirichlet"
            else "give more data, or ask for fewer clients",
        ).rejection()
    return parts


def _split_points(n_rows: int, n_clients: int, split: str, beta: float, rng: np.random.Generator) -> np.ndarray:
    """Indices that split the rows of a data set into those of the clients."""
    if split == "dirichlet":
        return np.round(np.cumsum(rng.dirichlet([beta] * n_clients))[:-1] * n_rows).astype(int)
    return np.round(np.arange(1, n_clients) * n_rows / n_clients).astype(int)


def split_train_and_validation(n_rows: int, validation_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows to learn from and of those to judge by; one row is only learned from."""
    n_validation = min(round(validation_share * n_rows), n_rows - 1) if validation_share else 0
    if validation_share and n_rows > 1:
        n_validation = max(n_validation, 1)
    order = np.random.default_rng(seed).permutation(n_rows).tolist()
    return sorted(order[n_validation:]), sorted(order[:n_validation])


def refuse_small_clients(
    rows_by_client: Sequence[Sequence[tuple[int, int]]], is_per_data_set: bool, validation_share: float, batch: int
) -> None:
    """Reject (empty-client) where what a client holds back leaves it less to learn from, and less than an update takes.

    rows_by_client   rows of every client, as `partition_rows` has them
    is_per_data_set           each data set is learned from by itself
    """
    for client, rows in enumerate(rows_by_client):
        for count in Counter(number if is_per_data_set else 0 for number, _ in rows).values():
            learn, n_validation = (len(part) for part in split_train_and_validation(count, validation_share, 0))
            if learn < min(n_validation, batch):
                raise empty_client(
                    f"client {client} would judge itself by {n_validation} of its {count} rows and learn from {learn}",
                    help=f"an update takes {batch}: hold less back, or give more data",
                    argument="hold batch",
                ).rejection()
