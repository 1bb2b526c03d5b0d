"""Engines by their names.

The files of a knowledge base stay the truth: an engine holds a copy of the vectors of one version, under its name,
made when it is opened and not there yet.
"""

from importlib.util import find_spec

from torch import Tensor

from .index import Flat, Index, no_engine

MANY = 100_000  # vectors; exact search of more is a job for faiss, where it is installed


def open_index(engine_name_or_url: str, vectors: Tensor, version: str) -> Index:
    """The engine of a name, with these vectors in it. "auto" is exact up to 100,000 of them, and where faiss is not
    installed. Reject (no-vector-engine) where there is none."""
    kind, _, address = engine_name_or_url.partition(":")
    if engine_name_or_url == "auto":
        kind = "faiss" if len(vectors) > MANY and find_spec("faiss") else "flat"
    if kind == "flat" and not address:
        return Flat(vectors)
    if kind == "faiss" and not address:
        _require_module("faiss", engine_name_or_url)
        from .faiss import InvertedFile

        return InvertedFile(vectors)
    if kind in ("postgresql", "postgres") and address.startswith("//"):
        _require_module("psycopg", engine_name_or_url)
        from .postgres import Postgres

        return Postgres(engine_name_or_url, vectors, version)
    if kind == "qdrant" and address:
        _require_module("qdrant_client", engine_name_or_url)
        from .qdrant import Qdrant

        return Qdrant(address, vectors, version)
    raise no_engine(
        f"`{kind}` is no engine of vectors",
        help="write flat, faiss, postgresql://HOST/DATABASE or qdrant:http://HOST:6333",
    ).rejection()


def _require_module(module: str, engine: str) -> None:
    if not find_spec(module):
        kind = engine.partition(":")[0]
        raise no_engine(f"`{kind}` needs the module `{module}`", help="pip install 'effc[vectors]'").rejection()
