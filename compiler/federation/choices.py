"""What a recipe's choices can't be together, beyond what `check` reads off the words alone."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...dsl.diagnostics import Diagnostic, Reject
from .faults import unfit_strategy
from .personal import MANY
from .secure import LEAST

if TYPE_CHECKING:
    from ..targets.flower import Flower


def check_choices(asked: "Flower", sets: int) -> None:
    """Reject (unfit-strategy) what can't be, of a federation over so many data sets."""
    found = [*_of_clients(asked), *_of_strategies(asked, sets)]
    if found:
        raise Reject(*found)


def _of_clients(asked: "Flower") -> Iterator[Diagnostic]:
    for name, given in (("ranks", asked.ranks), ("budgets", asked.budgets)):
        if given and len(given) != asked.clients:
            yield unfit_strategy(
                f"{len(given)} {name} for {asked.clients} clients", help="give one for each client", argument=name
            )
    if asked.budgets and max(b.value for b in asked.budgets) < 1:
        yield unfit_strategy(
            "no client has a budget of 100%, and one tells the others the weights to start from",
            help="give one of them `100%`",
            argument="budgets",
        )
    if asked.secure and asked.clients < LEAST:
        yield unfit_strategy(
            f"a sum of {asked.clients} states tells whose they are",
            help=f"`clients: {LEAST}` or more",
            argument="clients secure",
        )


def _of_strategies(asked: "Flower", sets: int) -> Iterator[Diagnostic]:
    personal = asked.strategy == "abm"
    if asked.trains == "reft" and personal and asked.way == "function" and asked.clients > MANY:
        yield unfit_strategy(
            f"`way: function` puts the others together for each of {asked.clients} clients anew, whose cost grows with "
            "their square",
            help=f"`way: align`, or at most {MANY} clients",
            argument="way clients",
        )
    if personal and asked.mixing == "adaptive" and not asked.hold.value:
        yield unfit_strategy(
            "`mixing: adaptive` tries shares on rows that a client holds back, and `hold` is 0%",
            help="`hold: 10%`, or `mixing: fixed`",
            argument="hold mixing",
        )
    if asked.stream and not 1 < sets <= asked.rounds:
        yield unfit_strategy(
            f"a stream of {sets} data sets has {asked.rounds} rounds",
            help="give two data sets or more, and a round for each",
            argument="data rounds stream",
        )
