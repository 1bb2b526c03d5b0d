"""Random token ids, or whatever else a model takes, for tests of shape and speed."""

from collections.abc import Iterator
from typing import Any

from ...dsl.diagnostics import Reject
from ..store.cache import digest
from ..words.context import Context
from ..words.kinds import Data, param
from ..words.token_rows import bad_rows


class Synthetic(Data):
    """Random token ids, or whatever else a model takes, for tests of shape and speed.

    Ids are uniform over the model's vocabulary, pixels and the like normally distributed. Such rows exercise
    every path of a compile without data; what they say of quality means nothing, but how far a pruned model's
    predictions move can be told on them.

    Source: own.
    Example: data noise = synthetic(8, length: 128, seed: 0)
    """

    count: int = param("How many rows.", default=8, ge=1, le=10_000_000, unit="rows", positional=True)
    length: int = param("Tokens in a row.", default=128, ge=2, le=10_000_000, unit="tokens")
    seed: int | None = param("Decides the ids; the run's own seed where it is left out.", default=None)

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        import torch

        generator = torch.Generator().manual_seed(ctx.seed if self.seed is None else self.seed)
        if ctx.origin.vocabulary is None:
            return iter(torch.randn(self.count, *self._form(ctx), generator=generator))
        return iter(torch.randint(ctx.origin.vocabulary, (self.count, self.length), generator=generator))

    def identity(self, ctx: Context) -> str:
        seed = ctx.seed if self.seed is None else self.seed
        drawn = self._form(ctx) if ctx.origin.vocabulary is None else ctx.origin.vocabulary
        return digest(["synthetic", self.count, self.length, seed, drawn])

    def _form(self, ctx: Context) -> tuple[int, ...]:
        """The shape of one row of what a model without a vocabulary takes."""
        import torch

        from ..capture.sample import sample

        with torch.device("meta"):
            taken = list(sample(ctx.origin.build()).values())
        if len(taken) != 1 or not taken[0].is_floating_point():
            raise Reject(
                bad_rows(
                    f"{ctx.origin.label} takes {len(taken)} inputs and has no `vocab_size` to draw ids "
                    "from: random rows can't be made for it"
                )
            )
        return tuple(taken[0].shape[1:])
