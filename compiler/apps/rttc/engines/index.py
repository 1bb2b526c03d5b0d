"""The one interface of engines, and the exact one."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .....dsl.syntax.diagnostics import Fault
from ..selection import nearest_indices

no_engine = Fault(
    "no-vector-engine",
    "A knowledge base was to be searched by an engine that is not there.\n\n"
    "`flat` is exact and always there; `faiss` needs the package faiss-cpu; `postgresql://HOST/DATABASE` a server "
    "with the extension vector and the package psycopg; `qdrant:http://HOST:6333` a server and the package "
    "qdrant-client. `pip install effc[vectors]` brings the packages.",
    exit="environment",
)


class Unreachable(Exception):
    """No samples can be had now; the sentence says why."""


class Index(Protocol):
    """Vectors of one version of a base."""

    def nearest_indices(self, query: Tensor, count: int) -> list[int]:
        """Rows with the largest inner products with a query [width], the largest first. Raises Unreachable."""


@dataclass(frozen=True)
class Flat:
    """Every vector [n, width] is looked at."""

    vectors: Tensor

    def nearest_indices(self, query: Tensor, count: int) -> list[int]:
        return nearest_indices(query, self.vectors, count)
