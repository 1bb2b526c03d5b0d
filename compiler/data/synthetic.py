"""Random token ids, for tests of shape and speed."""

from collections.abc import Iterator
from typing import Any

from ...dsl.diagnostics import Reject
from ..cache import digest
from ..context import Context
from ..kinds import Data, param
from ..windows import bad_rows


class Synthetic(Data):
    """Random token ids, for tests of shape and speed.

    Uniform over the model's vocabulary. Such rows exercise every path of a compile without a text; what they
    say of quality means nothing.

    Source: own.
    Example: data noise = synthetic(8, length: 128, seed: 0)
    """

    count: int = param("How many rows.", default=8, ge=1, unit="rows", positional=True)
    length: int = param("Tokens in a row.", default=128, ge=2, unit="tokens")
    seed: int | None = param("Decides the ids; the run's own seed where it is left out.", default=None)

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        import torch

        generator = torch.Generator().manual_seed(ctx.seed if self.seed is None else self.seed)
        return iter(torch.randint(self._vocabulary(ctx), (self.count, self.length), generator=generator))

    def identity(self, ctx: Context) -> str:
        seed = ctx.seed if self.seed is None else self.seed
        return digest(["synthetic", self.count, self.length, seed, self._vocabulary(ctx)])

    def _vocabulary(self, ctx: Context) -> int:
        if ctx.origin.vocabulary is None:
            raise Reject(bad_rows(f"the config of {ctx.origin.label} has no `vocab_size` to draw ids from"))
        return ctx.origin.vocabulary
