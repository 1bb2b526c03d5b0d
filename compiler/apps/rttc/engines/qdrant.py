"""Qdrant: a collection for each version of a base.

Tried with the client's own mode in memory; no server of Qdrant was at hand.
"""

import os
from typing import Any

from qdrant_client import QdrantClient, models
from torch import Tensor

from .index import Unreachable, no_engine

_SECONDS, _BATCH = 5, 512


class Qdrant:
    """
    place    http://HOST:6333, or `:memory:` in this process; QDRANT_API_KEY holds a key
    """

    def __init__(self, location: str, vectors: Tensor, version: str):
        self._name = f"effc_{version}"
        try:
            self._client = QdrantClient(location) if location == ":memory:" else _client(location)
            self._store_vectors_unless_stored(vectors)
        except Exception as error:  # the client raises those of httpx, grpc and its own
            raise no_engine(
                f"Qdrant can't be used: {type(error).__name__}", help="see `effc explain`"
            ).rejection() from error

    def nearest_indices(self, query: Tensor, count: int) -> list[int]:
        try:
            response: Any = self._client.query_points(self._name, query=query.tolist(), limit=count)
        except Exception as error:
            raise Unreachable("Qdrant does not answer") from error
        return [int(point.id) for point in response.points]

    def _store_vectors_unless_stored(self, vectors: Tensor) -> None:
        client, (count, width) = self._client, vectors.shape
        if client.collection_exists(self._name):
            if client.count(self._name).count == count:
                return
            client.delete_collection(self._name)
        shape = models.VectorParams(size=width, distance=models.Distance.DOT)
        client.create_collection(self._name, vectors_config=shape)
        for start in range(0, count, _BATCH):
            rows = range(start, min(count, start + _BATCH))
            points = [models.PointStruct(id=row, vector=vectors[row].tolist()) for row in rows]
            client.upsert(self._name, points, wait=True)


def _client(location: str) -> QdrantClient:
    key = os.environ.get("QDRANT_API_KEY")
    return QdrantClient(url=location, api_key=key, timeout=_SECONDS, check_compatibility=False)
