"""Losses of the original, the program in memory and every form on a few tokens: compression apart from runtime."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..core.quantity import significant_digits, size_text


@dataclass(frozen=True)
class Account:
    """A few tokens through the original, the program in memory or a form of the artifact.

    divergence   KL from the original, nats per token: what compression and runtime cost together
    drift        KL from the program in memory, of forms alone: what file format and runtime changed
    agreement    share of positions where it would choose the original's next token
    perplexity   None of random tokens
    bytes        of weights; of a form, of its files
    data         that the tokens are from; "" of random ones
    """

    what: str
    divergence: float | None
    drift: float | None
    agreement: float | None
    perplexity: float | None
    bytes: int
    tokens: int
    data: str = ""

    @property
    def where(self) -> str:
        return f"{self.tokens} tokens of {self.data}" if self.data else f"{self.tokens} random tokens"


def merge_accounts(accounts_by_artifact: Mapping[str, tuple[Account, ...]]) -> list[Account]:
    """The rows of several artifacts of one pipeline: the original and programs in memory once, forms by artifact."""
    rows: dict[str, Account] = {}
    for artifact, accounts in accounts_by_artifact.items():
        for row in accounts:
            known = row.drift is None
            name = row.what if known or len(accounts_by_artifact) == 1 else f"{artifact}: {row.what}"
            rows.setdefault(name, replace(row, what=name))
    return list(rows.values())


def account_rows(accounts: Iterable[Account]) -> list[tuple[str, ...]]:
    """A table as people read it, its head first."""
    head = ("", "KL to original", "KL to memory", "same top token", "perplexity", "bytes")
    return [head, *(_account_cells(row) for row in accounts)]


def _account_cells(row: Account) -> tuple[str, ...]:
    nats = ["" if v is None else f"{v:.2g}" if v < 1e-3 else f"{v:.4f}" for v in (row.divergence, row.drift)]
    same = "" if row.agreement is None else f"{100 * row.agreement:.1f} %"
    return (
        row.what,
        *nats,
        same,
        "" if row.perplexity is None else significant_digits(row.perplexity),
        size_text(row.bytes),
    )
