"""From a recipe's amount to a budget, and what can't be reached."""

from collections.abc import Sequence

from ...dsl.diagnostics import Fault, Reject
from ...dsl.skeleton import Skeleton
from ..amount import Amount
from .candidate import Pool
from .loop import Budget
from .saving import OF_MODEL, whole

out_of_reach = Fault(
    "out-of-reach",
    "A step is to remove more than can go.\n\n"
    "A model keeps its last branch, and every module that is narrowed keeps a step of its width.")


def budget(skeleton: Skeleton, amount: Amount, kind: str, total: float | None = None) -> Budget:
    """What is to be saved: of what the amount's ratio is a share of, or of items of the kind.

    total   how much there is to choose from, where it isn't all that the skeleton says: items, or a measured latency
    """
    of = amount.of or kind
    if of == "latency":
        assert total is not None, "a latency is measured"
        return Budget(of, amount.value.value * total, total)
    if of in OF_MODEL:
        size = whole(skeleton, of)
        share = amount.value.value * size
        return Budget(of, share if amount.removes else size - share, size)
    size = total if total is not None else int(whole(skeleton, of))
    return Budget(of, size - amount.kept(size), size)


def refuse_unreachable(pools: Sequence[Pool], wanted: Budget) -> None:
    """Reject a budget that stays unmet when all that may go has gone, naming what could be reached."""
    refuse_unreached(sum(pool.reachable(wanted.of) for pool in pools), wanted)


def refuse_unreached(most: float, wanted: Budget) -> None:
    """Reject a budget of which only `most` can be saved."""
    if not wanted.is_met(most):
        share, reach = wanted.goal / wanted.total, _floor(most / wanted.total)
        raise Reject(out_of_reach(
            f"{share:.1%} of {wanted.of} are to go, and at most {reach} can",
            help=f"remove at most {reach} of {wanted.of}, cut in smaller steps, or let more modules be cut"))


def _floor(share: float) -> str:
    return f"{int(share * 1000) / 10:g}%"
