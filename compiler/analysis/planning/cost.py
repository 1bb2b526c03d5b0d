"""Cost of a step and of a target on the machine, from shapes and from its speeds: for `plan`.

Counted is what grows with the model: loading, forwards, looks at weights, solving, hashing and writing what changed.
Times are of an idle machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....dsl.checker.recipe import Emit, Invocation, Pipeline
from ....dsl.checker.skeleton import Skeleton
from ....dsl.checker.values import DataRef, MetricRef, references_in
from ...core.cache import Cache
from ...core.memory import fits_in_memory, is_too_large_to_copy
from ...core.speed_cache import cached_or_measured_speeds
from ...core.speeds import Speeds
from ...models.checkpoints.sidecar_files import sidecar_bytes
from ...plugin.interfaces import Effort, Pass
from ...plugin.target import Target
from . import shrink
from .peak_memory import MARGIN, are_weights_memory_mapped, bytes_per_parameter, bytes_without_weights, changed_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ...plugin.context import Context

PROBES = 20  # of a check in a fresh process: short forwards in memory, and as many there
# Of accounts: rows, each a forward; tokens of one, for which llama.cpp is opened; and bytes of logits of one form. Held
# are those of the original, the program and a form, and what compares a row of them.
ROWS, LENGTH, CACHE_BYTES, ACCOUNTS = 4, 64, 64 << 20, 4
LEFT = 96 << 20  # what a search leaves: kernels that were compiled for each shape, freed memory in pieces
# Of a speed that nobody asked for: steps of a model that a round times after a prompt, rounds, and seconds after which
# none is begun any more.
CLOCKED, PROMPT, ROUNDS, UNASKED = 14, 128, 3, 30.0
PAGES = 44 << 10  # of a manifest, measures, a card and a list of parts
HASHES = 3  # of what changed: as it is mapped, as the step is kept, as it is named


@dataclass(frozen=True)
class Emission:
    """A target of a plan: seconds, the most memory of this process, and bytes on disk.

    weight_bytes   of the weights as the target stores them, which the metric `bytes` counts
    """

    call: Invocation
    source: str
    seconds: float
    peak_bytes: int
    disk_bytes: int
    weight_bytes: int = 0


def machine_speeds(ctx: "Context") -> Speeds:
    return cached_or_measured_speeds(ctx.settings.cache_dir)


def dtype_of(skeleton: Skeleton) -> str:
    return skeleton.facts.get("dtype") or "float32"


def loading_seconds(skeleton: Skeleton, ctx: "Context") -> float:
    """Seconds until a model has its weights, all looked at, and its graphs."""
    work = {"look": shrink.param_count(skeleton), "seconds": 0.5 + 0.02 * len(skeleton.units)}
    if not are_weights_memory_mapped(ctx.origin):
        work["read"] = 2 * shrink.param_bytes(skeleton)
    return machine_speeds(ctx).seconds(work)


def estimate_step_seconds(
    call: Invocation, before: Skeleton, after: Skeleton, loads_model: bool, effort: Effort, tokens: int, ctx: "Context"
) -> float:
    """Estimate the seconds of one step that is not in the cache. The first one loads the model, and hashes it unless
    that was done."""
    speed, changed = machine_speeds(ctx), changed_bytes(call, before, after)
    flops = tokens * shrink.flops_per_token(before, 512)
    total_bytes = shrink.param_bytes(after)
    work = {"hash": total_bytes + (HASHES - 1) * changed, "disk": changed}
    total = flops / speed.matmul_speed(dtype_of(before)) + speed.seconds(work) + speed.seconds(effort.work)
    if loads_model:
        total += loading_seconds(before, ctx)
        known = Cache(ctx.settings.cache_dir).read_value({"tensors of": ctx.origin.identity, "dtype": ctx.origin.dtype})
        total += 0.0 if known else speed.seconds({"hash": shrink.param_bytes(before)}) + loading_seconds(before, ctx)
    return total


def estimate_emission(
    emit: Emit, current: Skeleton, original: Skeleton, pipeline: Pipeline, ctx: "Context"
) -> Emission:
    """Writing, hashing, reopening in a fresh process, and what is measured of it."""
    target: Target = ctx.registry.make("target", emit.call)
    speed, model_bytes, numbers = machine_speeds(ctx), shrink.param_bytes(current), shrink.param_count(current)
    if target.describes_artifacts:
        return Emission(emit.call, emit.source, 1.0, 0, 1 << 20)
    uniform = _layers_still_uniform_after(emit.source, pipeline, ctx)
    weights = shrink.stored_weight_specs(current, original, uniform, sidecar_bytes(ctx.origin))
    file_bytes, packing = target.files(weights)
    read = (PROBES + ROWS) * (model_bytes + file_bytes) + ROWS * shrink.param_bytes(original)
    tokens = sum(
        _token_count_of_arguments(dict(bound.metric.args), ctx) for bound in pipeline.expects if bound.metric.args
    )
    rereads = 0
    if current.facts.get("causal_lm"):
        both = shrink.param_bytes(original) + file_bytes
        rounds = ROUNDS if speed.seconds({"read": CLOCKED * both}) < UNASKED else 1
        read, tokens = read + rounds * CLOCKED * both, tokens + rounds * PROMPT
        rereads = 0 if fits_in_memory(both) else rounds * both  # read from disk whenever its turn comes
    work = {"disk": file_bytes + rereads, "hash": 2 * file_bytes, "read": read, "look": 2 * numbers, **packing}
    flops = 2 * tokens * shrink.flops_per_token(original, 512)
    seconds = (
        speed.seconds(work)
        + flops / speed.matmul_speed(dtype_of(current))
        + 2 * loading_seconds(current, ctx)
        + speed.start
    )
    engine = file_bytes if packing and not is_too_large_to_copy(file_bytes) else 0  # reads its weights; torch maps them
    resident = (
        bytes_without_weights(current)
        + shrink.packed_bytes(current)
        + (LEFT if _has_scoring_step(emit.source, pipeline) else 0)
    )
    peak = int(
        MARGIN
        * (
            resident
            + max(
                _largest_packed_bytes(current) if packing else 0, _bytes_of_timed_prompts_and_logits(current) + engine
            )
        )
    )
    return Emission(
        emit.call, emit.source, seconds, peak, file_bytes + PAGES, weight_bytes=target.weight_bytes(weights)
    )


def _has_scoring_step(source_step: str, pipeline: Pipeline) -> bool:
    """Whether a step in front of a target scores candidates."""
    return any(references_in(step.call.args, MetricRef) for step in pipeline.step_and_ancestors(source_step))


def _layers_still_uniform_after(step_name: str, pipeline: Pipeline, ctx: "Context") -> bool:
    """Whether no step in front of a target says that it makes layers that differ, or sizes that it can't foresee."""
    steps = {step.name: step for step in pipeline.steps}
    while step_name in steps:
        call = steps[step_name].call
        pass_: Pass = ctx.registry.make("pass", call)
        if not pass_.foreseeable and not pass_.everywhere:  # what touches every module alike changes no shape
            return False
        if any(effect.startswith(("uneven", "missing")) for effect in pass_.effects()):
            return False
        step_name = steps[step_name].source
    return True


def _bytes_of_timed_prompts_and_logits(skeleton: Skeleton) -> int:
    """Bytes of logits, of prompts that are timed as well; only language models are accounted for."""
    words = skeleton.facts.get("vocab") or 0
    timed = 2 * PROMPT * words * bytes_per_parameter(skeleton)
    return ACCOUNTS * min(CACHE_BYTES, 4 * ROWS * LENGTH * words) + timed if skeleton.facts.get("causal_lm") else 0


def _largest_packed_bytes(skeleton: Skeleton) -> int:
    """Bytes of the largest tensor while it is packed."""
    return 3 * max((rows * wide for rows, wide, *_ in (s for s in skeleton.shapes().values() if len(s) > 1)), default=0)


def _token_count_of_arguments(args: Mapping[str, object], ctx: "Context") -> int:
    return sum(token_or_image_count(ctx.rows(ref)) for ref in references_in(dict(args), DataRef))


def token_or_image_count(rows: "Tensor") -> int:
    """Number of tokens, or of images: what `shrink.flops_per_token` gives the operations of."""
    return len(rows) if rows.is_floating_point() else rows.numel()
