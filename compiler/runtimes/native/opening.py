"""A folder with a plan, opened: the engine at work in it, ready to compute."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....kernels.native import KernelError
from ...core.json_errors import reject_on_error
from ...models.checkpoints.generation_config import read_generation_config
from ..model import DecoderModel
from ..seq2seq import Seq2SeqModel
from ..speculation import DRAFT_TOKENS
from .encoder import NativeEncoder
from .plan_files import load_weights, native_damaged, pieces, read_plan

if TYPE_CHECKING:
    from torch import Tensor

    from ....kernels.engine import Engine
    from .plan_files import NativePlanFile

SEQUENCES = 16  # open at once, unless asked for otherwise; each reserves room, and takes it as it grows
_REMEDY = "copy the artifact again, or compile again"


def open_native(
    folder: Path,
    *,
    threads: int | None = None,
    max_sequences: int = SEQUENCES,
    mapped: bool | None = None,
    skip_checks: bool = False,
    batch_invariant: bool = False,
    prefix_tokens: int = 0,
) -> DecoderModel:
    """The model of a folder that the target `native` wrote.

    threads         that compute; as many as torch has by default
    max_sequences   that can be open at once
    mapped          leave weights on disk, mapped: no copy is made, processes share the memory, and computing is slower
                    where the system caches files in small pages; they must stay as they are for as long as the model is
                    open. By default those are mapped that take more than a quarter of the machine's memory
    skip_checks     do not hold weights against their checksums, which reads each whole
    batch_invariant logits of a sequence are the same to the bit whatever else a call computes
    prefix_tokens   tokens of earlier prompts that are held, for prompts that begin alike; sums are then rounded in
                    another order than of a prompt that is read whole
    """
    import torch

    from ....kernels.engine import Engine

    threads = threads or torch.get_num_threads()
    plan_file = read_plan(folder)
    weights = load_weights(folder, plan_file, mapped=mapped, threads=threads)
    with reject_on_error(native_damaged, f"{folder}", _REMEDY, error_types=KernelError):
        if not skip_checks:
            verify_weight_contents(weights, plan_file.entries, threads)
        engine = Engine(
            plan_file.plan,
            weights,
            threads=threads,
            max_sequences=max_sequences,
            copy_weights=False,
            batch_invariant=batch_invariant,
        )
        _check_vocabulary_size(plan_file, engine)
    start = plan_file.facts.get("start")
    if engine.sources and (type(start) is not int or not 0 <= start < plan_file.plan["vocabulary"]):
        raise native_damaged("plan.json names no token that a target begins with", help="compile again").rejection()
    kind = Seq2SeqModel if engine.sources else NativeEncoder if "gives" in plan_file.facts else DecoderModel
    generation = read_generation_config(folder)
    plan, facts = plan_file.plan, plan_file.facts
    model = kind(engine, plan, weights, facts, max_sequences, generation, prefix_tokens=prefix_tokens)
    if kind is DecoderModel and batch_invariant and engine.backward:
        model.draft_tokens = DRAFT_TOKENS
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def verify_native_folder(folder: Path) -> None:
    """Hold every weight of a folder against its checksum, and every step against what it reads; nothing computes.
    Raises Reject (native-damaged)."""
    from ....kernels.engine_plan import check_plan_and_weights

    plan_file = read_plan(folder)
    with reject_on_error(native_damaged, f"{folder}", _REMEDY, error_types=KernelError):
        weights = load_weights(folder, plan_file, mapped=True, threads=1)
        verify_weight_contents(weights, plan_file.entries, 1)
        check_plan_and_weights(plan_file.plan, weights)


def _check_vocabulary_size(plan_file: "NativePlanFile", engine: "Engine") -> None:
    """Raises KernelError where a plan's vocabulary is no number of tokens, or another than its logits are of."""
    vocabulary = plan_file.plan.get("vocabulary")
    if type(vocabulary) is not int or vocabulary < 1:
        raise KernelError("the plan's vocabulary is no number of tokens")
    if "gives" not in plan_file.facts and vocabulary != engine.width:
        raise KernelError(f"the plan has a vocabulary of {vocabulary} and {engine.width} logits of a token")


def verify_weight_contents(
    weights: "dict[str, Tensor]", entries: Mapping[str, Mapping[str, Any]], threads: int
) -> None:
    """Read every weight whole. Raises KernelError with its name.

    A packed one has a checksum of its own, and a mask that does not fit its values would send a kernel out of bounds;
    embeddings, norms and tables are held against the hashes in the plan, each piece in a thread of its own.
    """
    import torch

    jobs: list[tuple[str, Callable[[], None]]] = []
    for name, tensor in weights.items():
        if tensor.dtype == torch.uint8:
            jobs.append((name, partial(_check_packed, tensor)))
        else:
            jobs += [(name, job) for job in _hash_checks_of_pieces(tensor, entries[name].get("sha256"))]

    def run_job(item: "tuple[str, Callable[[], None]]") -> None:
        name, job = item
        try:
            job()
        except KernelError as error:
            raise KernelError(f"`{name}`: {error}") from error

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run_job, jobs))


def _check_packed(tensor: "Tensor") -> None:
    from ....kernels import packed as packing

    packing.check_packed_weight(packing.kernel_of(tensor) or "dense_linear", tensor)


def _hash_checks_of_pieces(tensor: "Tensor", hashes: Any) -> "list[Callable[[], None]]":
    """Checks of a weight that is not packed: each piece by its stated hash."""
    import torch

    raw = tensor.view(-1).view(torch.uint8).numpy().data
    if isinstance(hashes, str):  # one hash of all, as it was written at first
        parts, hashes = [raw], [hashes]
    else:
        parts = pieces(raw)
    if not isinstance(hashes, list) or len(hashes) != len(parts):
        hashes = [None] * len(parts)
    return [partial(_check_piece_hash, part, expected) for part, expected in zip(parts, hashes, strict=True)]


def _check_piece_hash(contents: memoryview, sha256: Any) -> None:
    if hashlib.sha256(contents).hexdigest() != sha256:
        raise KernelError("the weight's contents do not match their checksum")
