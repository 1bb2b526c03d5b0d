"""Prediction error of a step: the model after it against the model before it, on rows."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...evaluation import reference
from ...inputs.data.generated import Generated
from ...models.rows.forward import evaluating, finite, memory_batches, outputs, total_nll

if TYPE_CHECKING:
    from ....dsl.checker.values import DataRef
    from ...ir.program import Program
    from ...plugin.context import Context

TOKENS = 64  # of each module's inputs that are kept to compare outputs on
ROWS = 4  # rows that those come from


@dataclass(frozen=True)
class Accuracy:
    """divergence   mean KL(before || after), nats per prediction
    perplexity   (before, after) on the same rows; None where no tokens are predicted
    """

    divergence: float
    perplexity: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        before, after = self.perplexity or (None, None)
        return {"divergence": self.divergence, "perplexity_before": before, "perplexity": after}


@dataclass(frozen=True)
class OutputsBefore:
    """Outputs of a model before a step, stored on disk."""

    rows: Tensor
    reference: reference.OriginalOutputs
    perplexity: float | None

    @staticmethod
    def record_on_disk(program: "Program", ctx: "Context", rows: Tensor) -> "OutputsBefore":
        file = ctx.workdir / "before.safetensors"
        head = ctx.workdir / "before-head.safetensors"
        reference.write_original_outputs(ctx, program.model, rows, file, head, "before")
        return OutputsBefore(rows, reference.open_reference(file, head), _perplexity(program.model, rows))

    def compare_to(self, model: nn.Module) -> Accuracy:
        """Accuracy of a model against the stored outputs."""
        divergence = reference.mean_kl_divergence(model, self.rows, self.reference, "divergence")
        after = _perplexity(model, self.rows)
        pair = None if self.perplexity is None or after is None else (self.perplexity, after)
        return Accuracy(divergence, pair)


def _perplexity(model: nn.Module, rows: Tensor) -> float | None:
    if rows.is_floating_point():
        return None
    nats, tokens = total_nll(model, rows)
    return math.exp(min(finite(nats / tokens, "perplexity"), 700.0))


def load_or_generate_rows(program: "Program", ctx: "Context", data: "DataRef | None") -> Tensor | None:
    """The rows that a step names, or some that the model writes; None of a model that writes nothing."""
    if data is not None:
        return ctx.rows(data)
    if not getattr(program.model, "can_generate", lambda: False)():
        return None
    return torch.stack(list(Generated.fitting(ctx.origin).rows(ctx.tokenizer, ctx)))


def sample_module_inputs(model: nn.Module, module_paths: list[str], rows: Tensor) -> dict[str, Tensor]:
    """Some of what each module is given, [tokens, in], evenly from a few rows; none of one not run."""
    samples: dict[str, Tensor] = {}

    def keeping(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach().flatten(0, -2)
            samples.setdefault(path, x[:: max(1, len(x) // TOKENS)][:TOKENS].clone())

        return hook

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(keeping(path), with_kwargs=True) for path in module_paths
    ]
    try:
        with evaluating(model):
            for batch in memory_batches(model, rows[:ROWS]):
                outputs(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return samples


@torch.no_grad()
def output_error(original: nn.Module, lowered: nn.Module, x: Tensor) -> float:
    """Relative error of an output, both as roots of summed squares."""
    expected = original(x).float()
    return float((lowered(x).float() - expected).norm() / expected.norm().clamp(min=1e-30))


def delete_original_outputs(folder: Path) -> None:
    """Delete the files of `OutputsBefore`."""
    for name in ("before.safetensors", "before-head.safetensors"):
        (folder / name).unlink(missing_ok=True)
