"""Text that the model itself writes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ....dsl.syntax.diagnostics import Reject
from ...analysis.planning.keys import library_versions
from ...core.cache import Cache, canonical_json_sha256
from ...core.deadline import DeadlineExceeded
from ...ir.capture.failed_forward import model_failure_diagnostic
from ...models.rows.forward import in_eval_mode, not_a_number
from ...models.rows.inputs import device_of
from ...models.rows.packed_inputs import can_generate_from_ids_alone
from ...plugin.context import Context
from ...plugin.interfaces import Data, param
from ...plugin.row_checks import invalid_rows

if TYPE_CHECKING:
    import torch

    from ...models.checkpoints.origin import Origin

AT_ONCE = 32  # rows that are written together: their caches lie in memory beside the model


class Generated(Data):
    """Text that the model itself writes, each token drawn from what the model predicts.

    For ranking and refitting where no text speaks for all that a model is used for: what it writes unprompted is
    spread over what it was trained on. The rows are kept in the cache. The model's weights are loaded once more
    while it writes, unless the step works on the original. An end of text is never drawn, so that every row is full.

    Source: Self-calibration (Williams, Chrysostomou and Aletras 2024, arXiv 2410.17170).
    Example: data own = generated(32, length: 256, seed: 0)
    """

    count: int = param("How many rows.", default=32, ge=1, unit="rows", positional=True)
    length: int = param("Tokens in a row, the first one included.", default=256, ge=2, unit="tokens")
    temperature: float = param("What logits are divided by before a token is drawn.", default=1.0, gt=0)
    seed: int | None = param("Decides the draws; the run's own seed where it is left out.", default=None)

    @classmethod
    def fitting(cls, origin: "Origin") -> "Generated":
        """As many rows as rank and refit well, no longer than the model's positions; the run's seed."""
        return cls(count=32, length=min(256, origin.positions or 256))

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        import torch

        cache = Cache(ctx.settings.cache_dir)
        parts = {
            "rows": self.identity(ctx),
            "versions": library_versions(),
            "device": ctx.settings.device,
            "threads": ctx.settings.threads,
        }
        rows = cache.read_value(parts)
        if rows is None:
            rows = self._generate_rows(tokenizer, ctx).tolist()
            ctx.origin.refuse_changed_files()
            cache.store_value(parts, rows)
        return iter(torch.tensor(rows, dtype=torch.int64))

    def identity(self, ctx: Context) -> str:
        return canonical_json_sha256(
            ["generated", self.count, self.length, self.temperature, self._seed(ctx), ctx.origin.identity]
        )

    def _seed(self, ctx: Context) -> int:
        return ctx.seed if self.seed is None else self.seed

    def _generate_rows(self, tokenizer: Any, ctx: Context) -> "torch.Tensor":
        """[count, length] on the CPU."""
        import torch

        model = (ctx.original and ctx.original.model) or ctx.origin.load().eval()
        if not can_generate_from_ids_alone(model):
            raise invalid_rows(
                f"{ctx.origin.label} is a {type(model).__name__}, which writes no text of its own",
                help='take rows from a text: `text("calib.txt")`, or of `sounds` where it hears',
            ).rejection()
        with torch.random.fork_rng(devices=_cuda_device_indices(device_of(model))), in_eval_mode(model):
            torch.manual_seed(self._seed(ctx))
            sizes = [min(AT_ONCE, self.count - n) for n in range(0, self.count, AT_ONCE)]
            steps = self.length * len(sizes)
            ticks = ctx.each(range(steps), "writing tokens of rows", steps)
            done = [self._generate_batch(model, _draw_start_tokens(model, tokenizer, ctx, n), ticks) for n in sizes]
        return torch.cat(done)

    def _generate_batch(self, model: Any, start_ids: "torch.Tensor", progress: Iterator[int]) -> "torch.Tensor":
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        def hook(_ids: "torch.Tensor", logits: "torch.Tensor") -> "torch.Tensor":
            next(progress)  # a token of every row
            return _require_finite(logits)

        new_tokens = self.length - 1
        config = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            eos_token_id=model.generation_config.eos_token_id,
        )
        try:
            with torch.no_grad():
                return model.generate(
                    start_ids,
                    attention_mask=torch.ones_like(start_ids),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([hook]),
                ).cpu()
        except (Reject, DeadlineExceeded):
            raise
        except Exception as error:  # a model's own code may raise anything
            raise model_failure_diagnostic(model, "writes", error).rejection() from error


def _require_finite(logits: "torch.Tensor") -> "torch.Tensor":
    """Logits to sample from; Reject where they are no distribution."""
    if logits.isnan().any() or logits.eq(float("inf")).any():  # minus infinity: never drawn
        raise not_a_number(
            "what the model predicts of its own text is not a number, or infinite",
            help="look at what made the model's weights, or give rows as `data`",
        ).rejection()
    return logits


def _draw_start_tokens(model: Any, tokenizer: Any, ctx: Context, count: int) -> "torch.Tensor":
    """[count, 1]: the token that texts begin with, else the one that they end with, else drawn like any other."""
    import torch

    known = (
        getattr(tokenizer, "bos_token_id", None),
        model.generation_config.bos_token_id,
        model.generation_config.eos_token_id,
    )
    vocabulary = ctx.origin.token_id_count or 1
    start = next((t for t in known if isinstance(t, int) and t < vocabulary), None)  # configs keep their defaults
    if start is not None:
        return torch.full((count, 1), start, device=model.device)
    return torch.randint(vocabulary, (count, 1)).to(model.device)


def _cuda_device_indices(device: "torch.device") -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
