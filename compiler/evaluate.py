"""Running a model over rows of tokens: losses and log-probabilities in float32, in bounded memory."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..dsl.diagnostics import Fault, Reject

not_a_number = Fault(
    "not-a-number",
    "A metric came out as NaN or infinite.\n\n"
    "The model's outputs are not finite: a step diverged or overflowed.")

BATCH_BYTES = 256 << 20          # what the logits of one batch may take
CHUNK_BYTES = 64 << 20           # what their float32 copy may take


def logits(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    """Logits [b, t, vocab] of a forward without a cache."""
    return output_logits(model(ids.to(device_of(model)), **without_cache(model), **more))


def output_logits(output: Any) -> Tensor:
    """The logits of what a model returned: a tensor, the first of a tuple, or the field of that name."""
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, Mapping) else output[0]


def without_cache(model: nn.Module) -> dict[str, Any]:
    """`use_cache=False` for models that know it."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the modules' modes come back."""
    modes = [(m, m.training) for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def batches(model: nn.Module, rows: Tensor) -> Iterator[Tensor]:
    """Rows in batches whose logits fit `BATCH_BYTES`; a pure function of shapes, so two models agree on them."""
    width = vocabulary(model) or 1 << 15
    each = rows.shape[1] * width * 4
    return iter(rows.split(max(1, min(16, BATCH_BYTES // each))))


def vocabulary(model: nn.Module) -> int | None:
    """How many logits a position has, where the model's config says."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    return getattr(text, "vocab_size", None)


def positions(values: Tensor) -> Iterator[slice]:
    """Slices of the first axis of [n, vocab] whose float32 copies fit `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // (values.shape[-1] * 4))
    for start in range(0, values.shape[0], step):
        yield slice(start, min(start + step, values.shape[0]))


def losses(values: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per position in float32, whatever the dtype: values [n, vocab], targets [n] -> [n] nats."""
    return torch.cat([nn.functional.cross_entropy(values[part].float(), targets[part], reduction="none")
                      for part in positions(values)])


def nll(model: nn.Module, rows: Tensor) -> tuple[float, int]:
    """Nats over all predicted tokens of rows [n, length], and how many there are: n * (length - 1)."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches(model, rows):
            values = logits(model, batch)[:, :-1]                              # [b, t - 1, vocab]
            targets = batch[:, 1:].to(values.device).reshape(-1)               # [b * (t - 1)]
            total += losses(values.reshape(len(targets), -1), targets).double().sum().item()
            count += len(targets)
    return total, count


def log_probs(model: nn.Module, ids: Tensor, begin: int) -> Tensor:
    """Log-probabilities [t - begin] of the tokens ids[begin:] of one row [t], each given all before it."""
    with evaluating(model):
        values = logits(model, ids[None])[0, begin - 1 : -1]                   # [t - begin, vocab]
        return -losses(values, ids[begin:].to(values.device))


def finite(value: float, metric: str, data: str = "") -> float:
    """The value, or `Reject` naming the metric and the data."""
    if math.isfinite(value):
        return value
    over = f" over `{data}`" if data else ""
    raise Reject(not_a_number(f"{metric}{over} is {'not a number' if math.isnan(value) else 'infinite'}",
                              help="look at the last step that changed weights; --dump-ir shows what each changed"))
