"""Cost of a training run, from shapes alone: for `plan`, before any weight is read."""

from collections.abc import Iterable
from math import prod

from ....dsl.checker.skeleton import Part, Skeleton
from ....dsl.checker.values import DataRef
from ...analysis.planning.cost import token_or_image_count
from ...plugin.context import Context
from ...plugin.interfaces import Effort
from .trained_pass import Learner

# Per parameter: itself, as what is mapped from disk is copied when it changes; gradient and AdamW's two
# moments in float32; a narrow one has a float32 copy as well.
STATE, COPY = 16, 4
WIDTHS = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def estimate_run_effort(
    params: Learner,
    data: DataRef,
    skeleton: Skeleton,
    ctx: Context,
    n_trained_params: int,
    *,
    forwards_per_batch: int = 1,
    extra_evaluations: int = 1,
    has_master_weights: bool = False,
) -> Effort:
    """Effort of a run over rows of `data` that a pass's parameters describe.

    forwards_per_batch   forwards of each batch in a step
    extra_evaluations    at the held-out rows, besides one after every so many steps
    """
    batch_tokens, held_out_tokens = params.batch * token_or_image_count(ctx.rows(data)[:1]), 0
    if params.held_out:
        looks = extra_evaluations + params.steps // max(params.every, 1)
        held_out_tokens = token_or_image_count(ctx.rows(params.held_out)) * looks
    return estimate_training_effort(
        skeleton,
        n_trained_params,
        batch_tokens,
        forwards_per_batch * params.steps * params.accumulate * batch_tokens,
        held_out_tokens,
        has_master_weights=has_master_weights,
        checkpointing=params.gradient_checkpointing,
    )


def estimate_training_effort(
    skeleton: Skeleton,
    n_trained_params: int,
    batch_tokens: int,
    training_tokens: int,
    evaluation_tokens: int,
    *,
    has_master_weights: bool = False,
    checkpointing: bool = False,
) -> Effort:
    """`n_trained_params` parameters, `batch_tokens` tokens in a forward; `training_tokens` and `evaluation_tokens`
    tokens in the whole run.

    has_master_weights     the trained parameters have the model's type and that is narrower than float32
    checkpointing   one layer at a time keeps its activations, the others what they were given
    """
    item, activations = WIDTHS.get(skeleton.facts.get("dtype", "float32"), 4), _activations(skeleton.parts)
    if checkpointing:
        layers = max(len(skeleton.units), 1)
        activations = activations // layers + layers * skeleton.facts.get("hidden", 0)
    activations = batch_tokens * (activations + 2 * (skeleton.facts.get("vocab") or 0)) * item
    state = n_trained_params * (STATE + (COPY if has_master_weights else 0))
    return Effort((4 if checkpointing else 3) * training_tokens + evaluation_tokens, state + activations)


def _activations(parts: Iterable[Part]) -> int:
    """Numbers per token that a backward pass needs: what every weight matrix is given and gives, and as much
    again for norms, gates and attention (measured on a Llama: 1.8 times)."""
    return 2 * sum(
        sum(shape) for part in parts for name, shape in part.tensors if len(shape) == 2 and part.kind != "Embedding"
    )


def adapter_param_count(parts: Iterable[Part], rank: int) -> int:
    """Parameters of adapters on these modules."""
    return sum(rank * sum(shape) for part in parts for name, shape in part.tensors if name == "weight")


def param_count_of_parts(parts: Iterable[Part]) -> int:
    return sum(prod(shape) for part in parts for _, shape in part.tensors)
