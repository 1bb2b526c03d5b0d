"""From a recipe's amount to a budget, and what can't be reached."""

from collections.abc import Sequence

from ...dsl.diagnostics import Fault, Reject
from ...dsl.skeleton import Branch, Group, Skeleton
from ...dsl.values import Shares
from ..planning.amount import Amount
from .loop import CUTS, Budget, out_of_reach
from .saving import OF_MODEL, Ledger, steps, whole

too_coarse = Fault(
    "too-coarse",
    "A cut is larger than all that it could be cut from.\n\n"
    "Of a kind of which nothing can go, a search would say nothing, and its budget would come from the others.")


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


def turns(order: Sequence[str], split: Shares | None) -> list[tuple[tuple[str, ...], float]]:
    """(kinds that compete, share of what is to go that must have gone when their turn ends)."""
    if split is None:
        return [(tuple(order), 1.0)]
    whole = sum(split.share(kind) for kind in order)
    found, total = [], 0.0
    for kind in order:
        total += split.share(kind) / whole if whole else 0.0
        found.append(((kind,), total))
    return [*found[:-1], (found[-1][0], 1.0)]          # 1.0: sums of shares are rounded


def reach(ledger: Ledger, of: str, branches: Sequence[Branch], sites: Sequence[tuple[Group, int]],
          least: int = 1) -> float:
    """The most that can be saved: every branch that may go, but of a model's last one its widths only.

    sites   groups that may be narrowed, each with its step; a step stays
    least   experts of every block that stay
    """
    inside = {site for b in branches for site in ledger.inside[b.site]}
    stays = {"experts": least}
    widths = {(g.site, g.kind): max(0, steps(g) - stays.get(g.kind, 1)) // step * step
              * ledger.of_step(g.site, g.kind, of) for g, step in sites}
    most = sum(ledger.branch(b.site, of) for b in branches)
    most += sum(saved for site, saved in widths.items() if site not in inside)
    if branches and len(branches) == len(ledger.skeleton.branches):
        most -= min(ledger.branch(b.site, of) - sum(widths.get(site, 0.0) for site in ledger.inside[b.site])
                    for b in branches)
    return most


def refuse_coarse(parameter: str, step: int, sites: Sequence[Group]) -> None:
    """Reject a step that is larger than every group of its kind."""
    most = max((steps(g) for g in sites), default=step)
    if step > most:
        what = sites[0].kind.replace("_", " ").replace("kv", "KV")
        raise Reject(too_coarse(f"`{parameter}` is {step}, and no module has more than {most} {what}",
                                help=f"write `{parameter}: {max(1, most // 8)}`, or take that kind out of `order`"))


def refuse_unreached(most: float, wanted: Budget) -> None:
    """Reject a budget of which only `most` can be saved."""
    if wanted.of == CUTS and not wanted.is_met(most):
        raise Reject(out_of_reach(f"{wanted.goal:g} cuts are to be made, and {most:g} can",
                                  help=f"make at most {most:g} cuts, or let more modules or kinds be cut"))
    if not wanted.is_met(most):
        share, reach = wanted.goal / wanted.total, _floor(most / wanted.total)
        less = "" if reach == "0%" else f"remove at most {reach} of {wanted.of}, "
        raise Reject(out_of_reach(
            f"{share:.1%} of {wanted.of} are to go, and at most {reach} can",
            help=f"{less}cut in smaller steps, or let more modules or kinds be cut"))


def _floor(share: float) -> str:
    return f"{int(share * 1000) / 10:g}%"
