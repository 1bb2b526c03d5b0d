"""Random token ids, or whatever else a model takes, for tests of shape and speed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ...core.cache import canonical_json_sha256
from ...plugin.context import Context
from ...plugin.interfaces import Data, param
from ...plugin.row_checks import invalid_rows, refuse_rows_beyond_model

TOKENS = "input_ids"  # the main input of models that read


class Synthetic(Data):
    """Random token ids, or whatever else a model takes, for tests of shape and speed.

    Ids are uniform over the model's vocabulary, pixels and the like normally distributed. Such rows exercise
    every path of a compile without data; what they say of quality means nothing, but how far a pruned model's
    predictions move can be told on them. A model of several inputs is given all of them, in one row.

    Source: own.
    Example: data noise = synthetic(8, length: 128, seed: 0)
    """

    count: int = param("How many rows.", default=8, ge=1, le=10_000_000, unit="rows", positional=True)
    length: int = param("Tokens in a row.", default=128, ge=2, le=10_000_000, unit="tokens")
    seed: int | None = param("Decides the ids; the run's own seed where it is left out.", default=None)

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        import torch

        from ...models.rows.packed_inputs import prepend_placeholders

        generator = torch.Generator().manual_seed(ctx.seed if self.seed is None else self.seed)
        layout = self._layout(ctx)
        if layout.words is None:
            return iter(torch.randn(self.count, *layout.shape, generator=generator))
        if layout.model is None:
            return iter(torch.randint(layout.words, (self.count, self.length), generator=generator))
        numbers = torch.randn(self.count, *layout.shape, generator=generator)
        ids = torch.randint(layout.words, (self.count, self.length), generator=generator)
        refuse_rows_beyond_model(ids, "synthetic", ctx.origin)
        return iter(torch.cat([numbers, prepend_placeholders(layout.model, ids).float()], dim=1))

    def identity(self, ctx: Context) -> str:
        from ...models.rows.packed_inputs import placeholders_of

        seed = ctx.seed if self.seed is None else self.seed
        words, ahead, model = self._layout(ctx)
        parts: Any = ahead if words is None else [ahead, words] if ahead else words
        placeholders = None if model is None else placeholders_of(model)
        return canonical_json_sha256(
            ["synthetic", self.count, self.length, seed, [parts, placeholders] if placeholders else parts]
        )

    def _layout(self, ctx: Context) -> "Layout":
        """The shape of the numbers that a row begins with, and how many ids there are for what follows them."""
        known, config = (ctx.origin.token_id_count, ctx.origin.target_token_id_count), ctx.origin.config
        words = min((n for n in known if n is not None), default=None)  # both halves of a row know them
        from ...models.rows.inputs import reads_tokens_alone, vocabulary_size

        if words is not None and reads_tokens_alone(config):
            return Layout(words)
        import torch

        from ...ir.capture.sample import sample_inputs
        from ...models.rows.packed_inputs import packed_input_parts, token_input_name

        with torch.device("meta"):
            model: Any = ctx.origin.build().to("meta")
        several = packed_input_parts(model)
        if words is not None and not several and getattr(model, "main_input_name", TOKENS) == TOKENS:
            return Layout(words)
        if several and all(part.dtype.is_floating_point for part in several):
            words = vocabulary_size(model, decoder=True) if token_input_name(model) else None
            return Layout(words, (sum(part.size for part in several),), model)
        with torch.device("meta"):
            inputs = list(sample_inputs(model).values())
        if len(inputs) != 1 or not inputs[0].is_floating_point():
            raise invalid_rows(
                f"{ctx.origin.label} takes {len(inputs)} inputs and has no `vocab_size` to draw ids "
                "from: random rows can't be made for it",
                help='put rows of all that it takes into a file, and name that: `tensors("rows.safetensors")`',
            ).rejection()
        return Layout(None, tuple(inputs[0].shape[1:]))


class Layout(NamedTuple):
    """Form of a row: ids below `words`, none where it is None, behind numbers that a model takes beside them."""

    words: int | None
    shape: tuple[int, ...] = ()
    model: Any = None  # of several inputs, without weights
