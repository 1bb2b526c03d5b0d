"""A knowledge base: samples and their vectors in a folder, searched exactly.

    kb.json               format, embedder, counts, hashes of the two others, version of all that; written last
    samples.jsonl         one sample a line
    vectors.safetensors   `vectors` [n, width] float32 of length 1, `centre` [width]

Exact search reads every vector: 11 ms for 1e5 of 384 numbers, measured on a core of a Zen 4. Nothing is unpickled,
and both files are compared with their hashes when a base is opened.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault
from ...core.cache import canonical_json_sha256, write_atomic
from ...core.json_errors import reject_on_error
from ...core.safe_read import CONFIG, read_json, refuse_irregular_file
from .embedder import Embedder
from .engines.index import Flat, Index
from .engines.opening import open_index
from .sample import Sample, invalid_samples, read_samples, without_duplicate_texts
from .selection import POOL, SELECTIONS

FORMAT, NAME, TEXTS, VECTORS = 1, "kb.json", "samples.jsonl", "vectors.safetensors"
_SHARD = 512  # samples that are embedded between two looks at the clock; a killed build goes on there

broken_base = Fault(
    "broken-knowledge-base",
    "A knowledge base is not whole, or not what was written.\n\n"
    "Its hashes are compared when it is opened. Build it again from its samples.",
    exit="environment",
)
other_embedder = Fault(
    "other-embedder",
    "A knowledge base and a query were embedded by different models.\n\n"
    "Vectors of different models mean nothing to each other.",
    exit="environment",
)


@dataclass(frozen=True)
class Match:
    """A sample that was retrieved, and the cosine of its vector with the query's."""

    sample: Sample
    score: float


@dataclass(frozen=True)
class KnowledgeBase:
    """An open one. `version` changes with any sample, vector or the embedder; `index` finds the nearest vectors,
    exactly where it is None."""

    samples: Sequence[Sample]
    vectors: Tensor
    centre: Tensor
    embedder: str
    version: str
    dropped: int = 0
    index: Index | None = None

    def with_search_engine(self, engine_name_or_url: str) -> "KnowledgeBase":
        """The same, searched by an engine: "flat", "faiss", "auto" or an address."""
        return replace(self, index=open_index(engine_name_or_url, self.vectors, self.version))

    def center_and_normalize(self, raw: Tensor) -> Tensor:
        """Vectors of an embedder [..., width], as the base compares them: less what all texts share, of length 1."""
        return nn.functional.normalize(raw - self.centre, dim=-1)

    def search(self, query: Tensor, count: int, selection: str = "diverse") -> list[Match]:
        """Samples for a placed query [width]: at most `count`, none twice. Raises Unreachable."""
        if query.shape != self.centre.shape:
            raise other_embedder(
                f"a query has {query.numel()} numbers, the base's vectors have {self.centre.numel()}",
                help="embed it with the base's own embedder",
            ).rejection()
        index = self.index or Flat(self.vectors)
        pool = index.nearest_indices(query, max(count, POOL) if selection == "diverse" else count)
        rows = [pool[at] for at in SELECTIONS[selection](query, self.vectors[pool], count)] if pool else []
        scores = self.vectors[rows] @ query if rows else torch.empty(0)
        return [Match(self.samples[row], float(score)) for row, score in zip(rows, scores, strict=True)]


def build_knowledge_base(
    files: Iterable[Path],
    embedder: Embedder,
    folder: Path,
    *,
    evaluation_questions: Sequence[str] = (),
    max_cosine: float = 0.98,
    draft_folder: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda at, of: None,
) -> KnowledgeBase:
    """Make a base in `folder`, or go on with one whose build was killed.

    evaluation_questions   questions of the evaluation: a sample that asks one of them, or comes as near as a cosine of
                           `max_cosine`, is left out and counted in `dropped`
    draft_folder           where vectors are kept until all are there; by default beside `folder`
    on_progress            called with the number of samples that are embedded, and of all
    """
    samples = without_duplicate_texts(sample for file in files for sample in read_samples(file))
    if not samples:
        raise invalid_samples("the files hold no sample").rejection()
    draft_folder = draft_folder or folder.with_name(f".{folder.name}.building")
    identity = canonical_json_sha256([[s.to_json() for s in samples], embedder.identity])[:32]
    raw = _embed_samples_in_shards(samples, embedder, draft_folder / identity, on_progress)
    centre = raw.mean(0)
    vectors = nn.functional.normalize(raw - centre, dim=-1)
    guard_vectors = nn.functional.normalize(embedder.embed(list(evaluation_questions)) - centre, dim=-1)
    indices = _non_leaking_sample_indices(samples, vectors, evaluation_questions, guard_vectors, max_cosine)
    if not indices:
        raise invalid_samples("every sample is one of the evaluation's questions").rejection()
    _write_base(
        folder,
        [samples[i] for i in indices],
        vectors[indices].contiguous(),
        centre,
        embedder.identity,
        len(samples) - len(indices),
    )
    shutil.rmtree(draft_folder / identity, ignore_errors=True)
    with suppress(OSError):  # another base may be on its way there
        draft_folder.rmdir()
    return open_knowledge_base(folder)


def _embed_samples_in_shards(
    samples: Sequence[Sample], embedder: Embedder, draft_folder: Path, on_progress: Callable[[int, int], None]
) -> Tensor:
    """Vectors of all samples [n, width], kept in shards in `draft_folder`: whole ones of an earlier run are read."""
    draft_folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(samples), _SHARD):
        file, chosen = draft_folder / f"{start:08}.safetensors", samples[start : start + _SHARD]
        try:
            part = load_file(file)["raw"]
        except (OSError, SafetensorError, KeyError):
            part = None
        if part is None or part.shape != (len(chosen), embedder.width):
            part = embedder.embed([sample.subject for sample in chosen])
            save_file({"raw": part}, fresh := file.with_suffix(".part"))
            os.replace(fresh, file)
        parts.append(part)
        on_progress(start + len(chosen), len(samples))
    return torch.cat(parts)


def _non_leaking_sample_indices(
    samples: Sequence[Sample],
    vectors: Tensor,
    evaluation_questions: Sequence[str],
    guard_vectors: Tensor,
    max_cosine: float,
) -> list[int]:
    """Numbers of the samples that give away no question of `evaluation_questions`, whose vectors are `guard_vectors`
    [g, width]."""
    if not evaluation_questions:
        return list(range(len(samples)))
    plain = {" ".join(text.lower().split()) for text in evaluation_questions}
    closest = torch.stack([vectors @ row for row in guard_vectors]).amax(0)  # [n]
    return [
        i
        for i, sample in enumerate(samples)
        if " ".join(sample.subject.lower().split()) not in plain and float(closest[i]) < max_cosine
    ]


def _write_base(
    folder: Path, samples: Sequence[Sample], vectors: Tensor, centre: Tensor, embedder: str, n_dropped: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NAME).unlink(missing_ok=True)
    lines = "".join(json.dumps(s.to_json(), ensure_ascii=False) + "\n" for s in samples)
    write_atomic(folder / TEXTS, lines.encode())
    save_file({"vectors": vectors, "centre": centre}, fresh := folder / f".{VECTORS}")
    os.replace(fresh, folder / VECTORS)
    hashes = {name: _hash(folder / name) for name in (TEXTS, VECTORS)}
    body = {
        "format": FORMAT,
        "samples": len(samples),
        "dropped": n_dropped,
        "embedder": embedder,
        "files": hashes,
        "version": knowledge_version(hashes, embedder),
    }
    write_atomic(folder / NAME, (json.dumps(body, indent=2, sort_keys=True) + "\n").encode())


def knowledge_version(hashes: Mapping[str, str], embedder: str) -> str:
    """Version of a base by its content; the `version` of a file that somebody wrote is not read."""
    return canonical_json_sha256([hashes, embedder])[:16]


def open_knowledge_base(folder: Path) -> KnowledgeBase:
    """Reject (broken-knowledge-base) unless both files are those that were written."""
    with reject_on_error(broken_base, f"{folder} is no whole knowledge base", "build it again from its samples"):
        body = read_json(folder / NAME, CONFIG)
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']}, and this effc reads {FORMAT}")
        if sorted(body["files"]) != [TEXTS, VECTORS]:
            raise ValueError(f"its files are {TEXTS} and {VECTORS}")
        for name in (TEXTS, VECTORS):
            if _hash(folder / name) != body["files"][name]:
                raise ValueError(f"{name} has other content than when it was written")
        tensors = load_file(folder / VECTORS)
        base = KnowledgeBase(
            list(read_samples(folder / TEXTS)),
            tensors["vectors"],
            tensors["centre"],
            body["embedder"],
            knowledge_version(body["files"], body["embedder"]),
            body["dropped"],
        )
        shape = (len(base.samples), base.centre.numel())
        if base.vectors.shape != shape or base.vectors.dtype != torch.float32:
            raise ValueError(f"it has {len(base.samples)} samples, and vectors {tuple(base.vectors.shape)}")
        return base


def refuse_other_embedder(base: KnowledgeBase, embedder: Embedder) -> None:
    if base.embedder != embedder.identity:
        raise other_embedder(
            "the knowledge base was embedded by another model than the one at hand",
            help="build it again with this embedder, or name the one it was built with",
        ).rejection()


def _hash(file: Path) -> str:
    refuse_irregular_file(file)
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
