"""Peak memory of a step, estimated from shapes for `plan` and compared with measured peaks by a test.

Anonymous memory counts, as `memory.held` measures it: weights that are mapped from disk come and go. What a
pass keeps beside its scores, it says by `effort`.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from ....dsl.checker.skeleton import Skeleton
from ....dsl.checker.values import MetricRef, references_in
from ...core.memory import reuse_budget_bytes, trim_heap_and_get_memory_bytes
from ...plugin.interfaces import Effort
from . import keys, shrink
from .selection import inner_parts

if TYPE_CHECKING:
    from torch import Tensor

    from ....dsl.checker.recipe import Invocation
    from ...models.checkpoints.origin import Origin
    from ...plugin.context import Context

CHUNK_BYTES, BATCH_BYTES, BATCH_ROWS = 64 << 20, 256 << 20, 16  # as compiler/models/rows/forward.py runs a model
MARGIN = 1.06  # what allocators and libraries keep for themselves
PROCESS = 280 << 20  # Python with torch and transformers, where the system doesn't tell
LAYER = 2 << 20  # of a layer: its modules and its graph, from the first step on


def bytes_per_parameter(skeleton: Skeleton) -> int:
    return shrink.param_bytes(skeleton) // max(1, shrink.param_count(skeleton))


def estimate_peak_bytes(
    call: "Invocation", before: Skeleton, after: Skeleton, is_first_step: bool, ctx: "Context", effort: Effort
) -> int:
    """Bytes that a step holds at most; the `is_first_step` works on the model itself, later ones on what came of it."""
    mapped = are_weights_memory_mapped(ctx.origin)
    weights = 0 if mapped else shrink.param_bytes(before)
    # What changed is stored, a tensor at a time; at the first step the original is hashed beside the result.
    storing = _bytes_of_largest(after, changed_shapes(call, before, after) if mapped else after.shapes())
    storing += shrink.param_bytes(before) if is_first_step and not mapped else 0
    if mapped and not effort.streams:
        storing += _bytes_of_shapes(
            after, _new_shapes(before, after)
        )  # until the step is kept; then they are mapped, too
    extra = max(effort.n_separate, max(storing, _estimate_scoring_bytes(call, before, ctx)) + effort.bytes)
    return int(MARGIN * (bytes_without_weights(before) + weights + extra))


def bytes_without_weights(skeleton: Skeleton) -> int:
    """Bytes of the process with a model that has its modules and graphs, but no weights of its own."""
    return (trim_heap_and_get_memory_bytes() or PROCESS) + LAYER * len(skeleton.units)


def _new_shapes(before: Skeleton, after: Skeleton) -> dict[str, tuple[int, ...]]:
    then = before.shapes()
    return {name: shape for name, shape in after.shapes().items() if then.get(name) != shape}


def changed_shapes(call: "Invocation", before: Skeleton, after: Skeleton) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a step leaves changed: of new shapes, else all that its `on` selects, or by default
    those inside the layers."""
    if reshaped := _new_shapes(before, after):
        return reshaped
    chosen = {f"{part.path}.weight" for part in inner_parts(before, call.args.get("on"))}
    return {name: shape for name, shape in after.shapes().items() if name in chosen}


def changed_bytes(call: "Invocation", before: Skeleton, after: Skeleton) -> int:
    return _bytes_of_shapes(after, changed_shapes(call, before, after))


def are_weights_memory_mapped(origin: "Origin") -> bool:
    """Whether weights stay on disk until they are touched: they are files of the type that is computed in."""
    stored = origin.config.get("dtype") or origin.config.get("torch_dtype") or origin.dtype
    return origin.folder is not None and stored == origin.dtype


def _bytes_of_shapes(skeleton: Skeleton, shapes: dict[str, tuple[int, ...]]) -> int:
    copies = {name for same in skeleton.tied for name in same[1:]}
    return bytes_per_parameter(skeleton) * sum(math.prod(shape) for name, shape in shapes.items() if name not in copies)


def _bytes_of_largest(skeleton: Skeleton, shapes: dict[str, tuple[int, ...]]) -> int:
    return bytes_per_parameter(skeleton) * max(map(math.prod, shapes.values()), default=0)


def estimate_batch_bytes(skeleton: Skeleton, rows: "Tensor") -> int:
    """Bytes of a batch of token rows besides weights: logits, in float32 as well, states, what a layer computes;
    0 of other rows."""
    if rows.dim() != 2 or rows.is_floating_point():
        return 0
    item, vocab, hidden, wide = _model_sizes(skeleton)
    tokens = _batch_tokens(len(rows), rows.shape[1], vocab)
    logits = vocab * (item + (4 if item < 4 else 0))
    return tokens * (logits + 4 * item * wide) + 2 * item * rows.numel() * hidden


class _ModelSizes(NamedTuple):
    number_bytes: int
    vocabulary: int
    hidden: int
    widest: int


def _model_sizes(skeleton: Skeleton) -> _ModelSizes:
    """Bytes of a number, the vocabulary, the width of hidden states, and the widest that a layer computes."""
    vocab, hidden = skeleton.facts.get("vocab") or 0, skeleton.facts.get("hidden") or 0
    wide = max((n for shape in skeleton.shapes().values() for n in shape if n != vocab), default=0)
    return _ModelSizes(bytes_per_parameter(skeleton), vocab, hidden, wide)


def _batch_tokens(num_rows: int, length: int, vocab_size: int) -> int:
    """Tokens of a batch."""
    return length * min(num_rows, BATCH_ROWS, max(1, BATCH_BYTES // max(1, 4 * vocab_size * length)))


def _estimate_scoring_bytes(call: "Invocation", skeleton: Skeleton, ctx: "Context") -> int:
    """Logits of a batch, twice more where a search compares them, what layers gave, what one computes."""
    scores = references_in(call.args, MetricRef)
    (item, vocab, hidden, wide), largest = _model_sizes(skeleton), 0
    for name in keys.data_named(ctx.recipe, scores):
        rows_tensor = ctx.tokenize_rows_once(name)
        rows, length = len(rows_tensor), rows_tensor[0].numel()
        batch = _batch_tokens(rows, length, vocab)
        prefix_bytes = min(
            item * hidden * rows * length * len(skeleton.units), reuse_budget_bytes(ctx.settings.max_memory)
        )
        largest = max(largest, 3 * item * vocab * batch + prefix_bytes + 4 * item * wide * batch)
    # Some are measured against the original's logits, made again in float32 as those of narrower types are.
    float32 = item < 4 or any(ctx.metric(ref).needs_original for ref in scores)
    return largest + (2 * min(CHUNK_BYTES, largest) if float32 else 0)
