"""What a recipe asks of a federation: checked against its data and its model, and written down as a declaration.

`asked` is the target `flower` with its arguments.
"""

from typing import TYPE_CHECKING, Any

from ...dsl.diagnostics import Reject
from ...dsl.values import DataRef, Ratio, to_json
from .budgets import Budget, Load, written
from .declaration import DataSet, Declaration
from .extent import check_forms, check_index, check_positions, check_prompts, check_ranks, check_whole, shapes_of
from .faults import unfit_strategy
from .partition import check_held_back, divided

if TYPE_CHECKING:
    from ...dsl.recipe import Invocation
    from ..ir.program import Program
    from ..words.context import Context
    from .sizes import Size


def refs_of(asked: Any) -> tuple[DataRef, ...]:
    """Its data sets."""
    return asked.data if isinstance(asked.data, tuple) else (asked.data,)


def check_rows(asked: Any, ctx: "Context") -> None:
    """Reject where a client would have no rows, or rows are not such as are to be learned from."""
    refs = refs_of(asked)
    if asked.trains == "index":
        check_index(ctx, refs)
    sizes = [len(ctx.rows(ref)) // (1 + (asked.trains == "index")) for ref in refs]
    parts = divided(sizes, asked.clients, asked.split, asked.beta, ctx.seed)
    if asked.trains != "index":
        check_held_back(parts, asked.stream, asked.hold.value, asked.batch)
    if asked.trains == "prompt":
        check_positions(asked.tokens, max(ctx.rows(ref).shape[1] for ref in refs), ctx.origin.positions)
    _check_kind(asked, ctx)


def _check_kind(asked: Any, ctx: "Context") -> None:
    """Reject rows with classes, or without prompts, where what is trained can't learn from them."""
    if asked.trains == "prompt" and _classifies(asked, ctx):
        raise Reject(
            unfit_strategy(
                "`trains: prompt` learns to predict tokens, and the rows have classes", help="`trains: lora`"
            )
        )
    if _classifies(asked, ctx) and asked.strategy in ("svd", "hetlora"):
        raise Reject(
            unfit_strategy(
                f"`strategy: {asked.strategy}` puts adapters together, and rows with classes train a head as well",
                help="`strategy: fedavg`, `ffa`, `stack` or `abm`",
            )
        )
    if asked.trains == "reft" and any(ctx.prompts(ref) is None for ref in refs_of(asked)):
        raise Reject(
            unfit_strategy(
                "interventions edit prompts, and the rows don't say where a prompt ends",
                help="give rows of `pairs` or `labels`",
            )
        )


def _classifies(asked: Any, ctx: "Context") -> bool:
    return any(ctx.labels(ref) is not None for ref in refs_of(asked))


def shapes(asked: Any, program: "Program", ctx: "Context") -> dict[str, tuple[int, ...]]:
    """Of a whole state, the head's among them where rows have classes."""
    rank = max(asked.ranks or (asked.rank,))
    if asked.trains == "reft":
        check_forms(program, asked.strategy == "abm", asked.way)
        check_prompts(program, ctx, refs_of(asked))
    made = shapes_of(program, asked.trains, asked.tokens, rank, asked.on)
    check_ranks(made, rank, "ranks" if asked.ranks else "rank")
    if _classifies(asked, ctx):
        from ..rows.prompts import head

        made |= {name: tuple(p.shape) for name, p in head(program.model).items()}
    return made


def _budgets(asked: Any) -> list[Budget]:
    return [b.value if isinstance(b, Ratio) else b for b in asked.budgets or ()]


def sizes_of(asked: Any, program: "Program", ctx: "Context") -> "list[Size]":
    """The sub-network of every client; none where no budgets are given."""
    from .sizes import sizes_for

    if not asked.budgets:
        return []
    load = Load(asked.batch, max(ctx.rows(ref).shape[1] for ref in refs_of(asked)))
    sizes = sizes_for(program, _budgets(asked), asked.counts, load)
    check_whole(program, sizes)
    return sizes


def declare(
    asked: Any, full: dict[str, tuple[int, ...]], sizes: "list[Size]", folder: str, base: str, ctx: "Context"
) -> Declaration:
    """The declaration of a federation over the model in `folder`, whose hash is `base`."""

    def data(ref: DataRef) -> DataSet:
        call: Invocation = ctx.recipe.data[ref.name]
        return DataSet(ref.name, call.word, {k: to_json(v) for k, v in call.args.items()})

    distinct = {size.params: size for size in sizes}
    same = ("trains", "alpha", "strategy", "center", "way", "clip", "noise", "delta", "clients", "split", "beta")
    same += ("steps", "batch", "lr", "rounds", "protects", "secure", "stream", "anchor", "top", "counted")
    same += ("allocation", "counts")
    return Declaration(
        **{name: getattr(asked, name) for name in same},
        base=base,
        folder=folder,
        full=full,
        ranks=asked.ranks or (),
        mix=None if asked.mixing == "adaptive" else asked.mix.value,
        hold=asked.hold.value,
        data=tuple(data(ref) for ref in refs_of(asked)),
        deadline=asked.deadline.seconds,
        share=asked.share.value,
        seed=ctx.seed,
        sizes=tuple(distinct.values()),
        size_of=tuple(list(distinct).index(size.params) for size in sizes),
        budgets=tuple(map(written, _budgets(asked))),
    )
