"""PostgreSQL with pgvector: a table for each version of a base, filled once, searched over a graph (HNSW)."""

import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg
from psycopg import sql
from torch import Tensor

from ....core.json_errors import reject_on_error
from .index import Unreachable, no_engine

_SECONDS = 10  # for a connection and for a statement
_EFFORT = 1000  # the most vectors that pgvector's `ef_search` takes

Result = TypeVar("Result")


class Postgres:
    """
    url    postgresql://USER@HOST/DATABASE; a password comes from PGPASSWORD or ~/.pgpass, as libpq reads them
    """

    def __init__(self, url: str, vectors: Tensor, version: str):
        assert re.fullmatch(r"[0-9a-f]{8,64}", version), f"a version is a hash, not {version!r}"
        self._url, self._lock = url, threading.Lock()
        self._table = sql.Identifier(f"effc_{version}")
        with reject_on_error(
            no_engine, "PostgreSQL can't be used", "see `effc explain no-vector-engine`", error_types=psycopg.Error
        ):
            self._connection = self._connect()
            self._store_vectors_unless_stored(vectors, f"effc_{version}")

    def nearest_indices(self, query: Tensor, count: int) -> list[int]:
        statement = sql.SQL("SELECT row FROM {} ORDER BY vector <#> %s::vector LIMIT %s").format(self._table)

        def find(connection: Any) -> list[int]:
            with connection.transaction():
                connection.execute(f"SET LOCAL hnsw.ef_search = {min(_EFFORT, max(100, 2 * count))}")
                return [row for (row,) in connection.execute(statement, (_literal(query), count))]

        return self._run_with_reconnect(find)

    def close(self) -> None:
        self._connection.close()

    def _connect(self) -> Any:
        return psycopg.connect(
            self._url, autocommit=True, connect_timeout=_SECONDS, options=f"-c statement_timeout={_SECONDS * 1000}"
        )

    def _run_with_reconnect(self, query: Callable[[Any], Result]) -> Result:
        """Run a query; a broken connection is opened again, once."""
        with self._lock:
            for last in (False, True):
                try:
                    return query(self._connection)
                except psycopg.OperationalError as error:
                    if last:
                        raise Unreachable("PostgreSQL does not answer") from error
                    self._reconnect()
        raise AssertionError("the second try returns or raises")

    def _reconnect(self) -> None:
        self._connection.close()
        try:
            self._connection = self._connect()
        except psycopg.OperationalError as error:
            raise Unreachable("PostgreSQL does not answer") from error

    def _store_vectors_unless_stored(self, vectors: Tensor, table_name: str) -> None:
        """Vectors and graph in one transaction: another server that starts now waits, and finds all of it."""
        count, width = vectors.shape
        with self._connection.transaction():
            self._connection.execute("SET LOCAL statement_timeout = 0")
            self._connection.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (table_name,))
            self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            exists = self._connection.execute("SELECT to_regclass(%s)", (table_name,)).fetchone()[0] is not None
            count_query = sql.SQL("SELECT count(*) FROM {}").format(self._table)
            if exists and self._connection.execute(count_query).fetchone()[0] == count:
                return
            self._connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(self._table))
            shape = sql.SQL("CREATE TABLE {} (row integer PRIMARY KEY, vector vector({}))")
            self._connection.execute(shape.format(self._table, sql.Literal(width)))
            with self._connection.cursor().copy(sql.SQL("COPY {} FROM STDIN").format(self._table)) as rows:
                for row, vector in enumerate(vectors):
                    rows.write_row((row, _literal(vector)))
            graph = sql.SQL("CREATE INDEX ON {} USING hnsw (vector vector_ip_ops)").format(self._table)
            self._connection.execute(graph)


def _literal(vector: Tensor) -> str:
    return str(vector.tolist())
