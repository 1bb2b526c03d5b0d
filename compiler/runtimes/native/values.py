"""Symbolic values of a graph while its plan is built."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from .layout import Layout


@dataclass(frozen=True)
class Rows:
    """Numbers of tokens.

    index     element numbers in the shape of the value
    pending   an elementwise function that is still to be applied, None where there is none
    """

    index: Tensor
    pending: "ElementwiseExpr | None" = None


@dataclass(frozen=True)
class ElementwiseExpr:
    """An elementwise function of one number, as a tree: `call` of its operands, which are `ElementwiseExpr`, the
    number itself (None), or constants.

    at   the node that computes it, which is another than the one that wants it computed
    """

    call: Callable[..., Any]
    operands: "tuple[ElementwiseExpr | float | None, ...]"
    at: fx.Node | None = field(default=None, compare=False)

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(
            *(x if part is None else part(x) if isinstance(part, ElementwiseExpr) else part for part in self.operands)
        )

    def constants(self) -> list[float]:
        numbers = [part for part in self.operands if isinstance(part, (int, float))]
        nested = [p.constants() for p in self.operands if isinstance(p, ElementwiseExpr)]
        return [*map(float, numbers), *(c for constants in nested for c in constants)]


@dataclass(frozen=True)
class Positional:
    """Numbers that depend on positions and lengths alone: computed from the graph where they are needed."""

    node: fx.Node


@dataclass(frozen=True)
class Mask(Positional):
    """Mask: the keys that a query sees."""


@dataclass(frozen=True)
class AllPositions(Positional):
    """All positions, named for each token: what a module chooses among no more than it may."""


@dataclass(frozen=True)
class FirstTokenRows:
    """Numbers of a text's first token, of which its class is told: `rows` are those of every token, made alike."""

    rows: Rows


def picks_first(rows: Rows, subscript: Any) -> bool:
    """Whether an index picks the first token of [batch, tokens, width] as a whole."""
    everything = slice(None)
    return rows.index.dim() == 3 and subscript in ((everything, 0), (everything, 0, everything))


@dataclass(frozen=True)
class CachedRows:
    """Numbers of these tokens and of all before them: what is made of each token alone is kept as it is made.

    Keys and values are what attention reads in the end; a slot of the engine's cache holds them in that form.
    """

    rows: Rows


@dataclass(frozen=True)
class SourceTokens:
    """Numbers of a source's tokens, which a decoder meets: rows of its encoder's plan."""

    rows: Rows


@dataclass(frozen=True)
class KeyScoreBias:
    """Numbers that scores gain [b, heads, queries, keys], where a mask does not hide them."""

    rows: Rows
    hides: Positional


@dataclass(frozen=True)
class ScorePairs:
    """Numbers of a token with each of those before it, on their way to weights of an attention that is written out."""

    node: fx.Node


@dataclass(frozen=True)
class Routed:
    """Value between a router and the sum of experts, by what it is for sampled rows.

    router    that the region begins with
    samples   the value for each sample
    inputs    rows of tokens that went into it
    dispatch  the last call of experts on the way to it, None before one
    """

    router: Any
    samples: list[Any]
    inputs: tuple[Rows, ...] = ()
    dispatch: Any = None


class TokenIds:
    """Token ids lie in a register of their own, the first, one column wide."""

    def __init__(self, layout: Layout):
        self.register = layout.register(1)
        self._layout = layout

    def are(self, index: Tensor) -> bool:
        register, _ = self._layout.registers_and_tokens(index.reshape(-1))
        return bool((register == self.register).all())


CACHE = object()  # the cache itself, of which only slots are ever read


OF_TOKENS = (  # values that hold numbers of each token of a batch
    Rows,
    CachedRows,
    ScorePairs,
    Routed,
    KeyScoreBias,
    FirstTokenRows,
)
