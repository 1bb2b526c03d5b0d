"""Federation of a recipe: checked against its data and its model, and written down as a declaration.

`request` is the target `flower` with its arguments.
"""

from typing import TYPE_CHECKING, Any, Literal

from ....dsl.checker.values import DataRef, Ratio, value_to_json
from .budgets import Budget, Load, budget_text
from .declaration import DataSet, Declaration
from .faults import incompatible_strategy
from .partition import partition_rows, refuse_small_clients
from .trainable_shapes import (
    refuse_data_without_pairs,
    refuse_incompatible_intervention_forms,
    refuse_prompt_beyond_positions,
    refuse_ranks_above_widths,
    refuse_short_prompts,
    require_full_size,
    trainable_state_shapes,
)

if TYPE_CHECKING:
    from ....dsl.checker.recipe import Invocation
    from ...ir.program import Program
    from ...plugin.context import Context
    from .sizes import SubNetwork


def data_refs_of(request: Any) -> tuple[DataRef, ...]:
    """Its data sets."""
    return request.data if isinstance(request.data, tuple) else (request.data,)


def refuse_incompatible_rows(request: Any, ctx: "Context") -> None:
    """Reject where a client would have no rows, or rows are not such as are to be learned from."""
    refs = data_refs_of(request)
    if request.trains == "index":
        refuse_data_without_pairs(ctx, refs)
    sizes = [len(ctx.rows(ref)) // (1 + (request.trains == "index")) for ref in refs]
    parts = partition_rows(sizes, request.clients, request.split, request.beta, ctx.seed)
    if request.trains != "index":
        refuse_small_clients(parts, request.stream, request.hold.value, request.batch)
    if request.trains == "prompt":
        refuse_prompt_beyond_positions(
            request.tokens, max(ctx.rows(ref).shape[1] for ref in refs), ctx.origin.positions
        )
    _refuse_incompatible_labels(request, ctx)


def _refuse_incompatible_labels(request: Any, ctx: "Context") -> None:
    """Reject rows with classes, or without prompts, where what is trained can't learn from them."""
    if request.trains == "prompt" and _has_labels(request, ctx):
        raise incompatible_strategy(
            "`trains: prompt` learns to predict tokens, and the rows have classes", help="`trains: lora`"
        ).rejection()
    if request.trains == "reft" and any(ctx.prompts(ref) is None for ref in data_refs_of(request)):
        raise incompatible_strategy(
            "interventions edit prompts, and the rows don't say where a prompt ends",
            help="give rows of `pairs` or `labels`",
        ).rejection()


def _has_labels(request: Any, ctx: "Context") -> bool:
    return any(ctx.labels(ref) is not None for ref in data_refs_of(request))


def check_and_get_state_shapes(request: Any, program: "Program", ctx: "Context") -> dict[str, tuple[int, ...]]:
    """Check the request against the model; shapes of the arrays of a whole state, the head's among them where rows have
    classes."""
    rank = max(request.ranks or (request.rank,))
    if request.trains == "reft":
        refuse_incompatible_intervention_forms(program, request.strategy == "abm", request.way)
        refuse_short_prompts(program, ctx, data_refs_of(request))
    result = trainable_state_shapes(program, request.trains, request.tokens, rank, request.on)
    refuse_ranks_above_widths(result, rank, "ranks" if request.ranks else "rank")
    if _has_labels(request, ctx):
        from ...models.rows.prompt_positions import parameters_above_body

        result |= {name: tuple(p.shape) for name, p in parameters_above_body(program.model).items()}
    return result


def _budgets(request: Any) -> list[Budget]:
    return [b.value if isinstance(b, Ratio) else b for b in request.budgets or ()]


def sub_network_per_client(request: Any, program: "Program", ctx: "Context") -> "list[SubNetwork]":
    """The sub-network of every client; none where no budgets are given."""
    from .sizes import largest_sub_networks

    if not request.budgets:
        return []
    load = Load(request.batch, max(ctx.rows(ref).shape[1] for ref in data_refs_of(request)))
    sizes = largest_sub_networks(program, _budgets(request), request.counts, load)
    require_full_size(program, sizes)
    return sizes


def make_declaration(
    request: Any,
    full_shapes: dict[str, tuple[int, ...]],
    sizes: "list[SubNetwork]",
    folder: Literal["compact", "model"],
    base_hash: str,
    ctx: "Context",
) -> Declaration:
    """The declaration of a federation over the model in `folder`, whose hash is `base_hash`."""

    def data(ref: DataRef) -> DataSet:
        call: Invocation = ctx.recipe.data[ref.name]
        return DataSet(ref.name, call.word, {k: value_to_json(v) for k, v in call.args.items()})

    distinct = {size.params: size for size in sizes}
    same: tuple[str, ...] = tuple(
        """
        trains alpha strategy center way clip noise delta clients split beta
        """.split()
    )
    same += ("steps", "batch", "lr", "rounds", "protects", "secure", "stream", "anchor", "top", "counted")
    same += ("allocation", "counts")
    return Declaration(
        **{name: getattr(request, name) for name in same},
        base=base_hash,
        folder=folder,
        full=full_shapes,
        ranks=request.ranks or (),
        mix=None if request.mixing == "adaptive" else request.mix.value,
        hold=request.hold.value,
        data=tuple(data(ref) for ref in data_refs_of(request)),
        deadline=request.deadline.seconds,
        share=request.share.value,
        seed=ctx.seed,
        sizes=tuple(distinct.values()),
        size_of=tuple(list(distinct).index(size.params) for size in sizes),
        budgets=tuple(map(budget_text, _budgets(request))),
        examples=0 if request.trains == "index" else request.examples or _largest_client_row_count(request, ctx),
    )


def _largest_client_row_count(request: Any, ctx: "Context") -> int:
    """Rows of the client that is dealt most."""
    sizes = [len(ctx.rows(ref)) for ref in data_refs_of(request)]
    return max(map(len, partition_rows(sizes, request.clients, request.split, request.beta, ctx.seed)))
