"""A federation's rounds as lines of a table, each printed when its round is over."""

import math

from ...core.quantity import size_text
from .history import ClientUpdate, Round

HEAD = f"{'round':>5}  {'clients':>7}  {'loss':>7}  {'worst':>7}  {'up':>9}  {'down':>9}  {'seconds':>7}  by client"


def round_line(round_: Round) -> str:
    """Numbers of a round; accuracy or loss of every client, `-` for one that was left out."""
    known = sorted(set(round_.updates) | {c for c in round_.faults if c >= 0})
    clients = " ".join(_accuracy_or_loss(round_.updates[c]) if c in round_.updates else "-" for c in known)
    return (
        f"{round_.number:>5}  {len(round_.updates):>7}  {_loss_text(round_.loss):>7}  {_loss_text(round_.worst):>7}  "
        f"{size_text(round_.bytes_up):>9}  {size_text(round_.bytes_down):>9}  {round_.seconds:>7.1f}  {clients}"
    )


def _accuracy_or_loss(result: ClientUpdate) -> str:
    """A client's accuracy where its rows have classes, else its loss."""
    return _loss_text(result.loss) if math.isnan(result.accuracy) else f"{result.accuracy:.1%}"


def _loss_text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
