"""Running a model over rows of tokens: losses and log-probabilities in float32, in bounded memory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault
from ...core.events import iterate_and_report
from .batch_limit import max_rows_per_forward
from .inputs import forward_args_and_kwargs, targets_and_prediction_mask, vocabulary_size
from .prompt_positions import prompts

not_a_number = Fault(
    "not-a-number",
    "A metric, or what a model computes, came out as NaN or infinite.\n\n"
    "The model's outputs are not finite: a step diverged or overflowed, or the model came like that.",
    exit="failure",
)
no_logits = Fault("no-logits", "A metric needs logits, and the model returns something else.")
no_next_token = Fault("no-next-token", "A metric over predicted tokens measures a model that predicts none.")
REMEDY = "look at the last step that changed weights; --dump-ir shows what each changed"

_TOWER_OUTPUTS = ("text_embeds", "image_embeds", "video_embeds", "audio_embeds")
BATCH_BYTES = 256 << 20  # what the logits of one batch may take
CHUNK_BYTES = 64 << 20  # what their float32 copy may take


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [b, t, vocab] of a forward without a cache; [b, 1, classes] of a model that judges rows as a whole."""
    args, kwargs = forward_args_and_kwargs(model, ids)
    values = logits_of_output(model(*args, **kwargs))
    return values if values.dim() > 2 else values[:, None]


def last_logits(model: nn.Module, ids: Tensor, n_tokens: int) -> Tensor:
    """As `logits`, of the last `n_tokens` tokens alone, which many models can compute without the others."""
    if "logits_to_keep" not in signature(model.forward).parameters:
        return logits(model, ids)[:, -n_tokens:]
    args, kwargs = forward_args_and_kwargs(model, ids)
    return logits_of_output(model(*args, **kwargs, logits_to_keep=n_tokens))[:, -n_tokens:]


def logits_of_output(output: Any) -> Tensor:
    """The logits of what a model returned: a tensor, the first of a tuple, or the field of that name."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" not in output:
        raise no_logits(
            f"the model returns {', '.join(output)}, and no logits to score it by",
            help="score it by `similarity` to the original, or take it with a head, as a ...ForMaskedLM",
        ).rejection()
    return output["logits"] if isinstance(output, Mapping) else output[0]


def has_logits(output: Any) -> bool:
    """Whether what a model returned has logits: one without a head returns hidden states."""
    return not isinstance(output, Mapping) or "logits" in output


def output_kind_of(model: nn.Module, rows: Tensor) -> str:
    """Output kind of a model: "tokens", "classes" of whole rows, or "states" without a head."""
    args, kwargs = forward_args_and_kwargs(model, rows)
    with evaluating(model):
        output = model(*args, **kwargs)
    if not has_logits(output):
        return "states"
    head_output = logits_of_output(output)
    values = head_output if head_output.dim() > 2 else head_output[:, None]
    return "tokens" if are_token_logits(model, values, rows, targets_and_prediction_mask(model, rows)[0]) else "classes"


def outputs(model: nn.Module, ids: Tensor) -> Tensor:
    """Outputs of a forward without a cache: logits, or the states of a model without a head."""
    args, kwargs = forward_args_and_kwargs(model, ids)
    return main_tensor_of_output(model(*args, **kwargs))


def main_tensor_of_output(output: Any) -> Tensor:
    """Logits, or else the first thing that a forward returns."""
    if isinstance(output, (tuple, list)):
        return main_tensor_of_output(output[0])
    if isinstance(output, Mapping):
        if towers := tower_embeddings(output):  # what each says, not who fits whom
            return torch.cat(towers, -1)
        return output[main_output_name(output)]
    return output  # a tensor, or what stands for one while a forward is traced


def tower_embeddings(output: Mapping[str, Any]) -> list[Tensor]:
    """Embeddings [b, d] of texts and of what a model of two towers compares them with; none of other models."""
    names = [name for name in _TOWER_OUTPUTS if name in output]
    return [output[name] for name in names] if "text_embeds" in names and len(names) > 1 else []


def main_output_name(output: Mapping[str, Any]) -> str:
    return next(name for name in ("logits", "last_hidden_state", *output) if name in output)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the modules' modes come back."""
    with in_eval_mode(model), torch.no_grad():
        yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode. Modules that were training train again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def memory_batches(model: nn.Module, rows: Tensor) -> Iterator[Tensor]:
    """Rows in batches whose logits fit `BATCH_BYTES`; a function of shapes alone, so two models agree."""
    width = vocabulary(model) or 1 << 15
    each = rows[0].numel() * (4 if rows.is_floating_point() else width * 4)
    return iter(rows.split(max(1, min(max_rows_per_forward(), BATCH_BYTES // each))))


def vocabulary(model: nn.Module) -> int | None:
    """Number of logits per position, where the model's config states it."""
    return vocabulary_size(model, decoder=True)


def slices_within_chunk_bytes(values: Tensor) -> Iterator[slice]:
    """Slices of the first axis of [n, vocab] whose float32 copies fit `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // (values.shape[-1] * 4))
    for start in range(0, values.shape[0], step):
        yield slice(start, min(start + step, values.shape[0]))


def token_losses(token_logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per position in float32, whatever the dtype: [n, vocab], targets [n] -> [n] nats."""
    return torch.cat(
        [
            nn.functional.cross_entropy(token_logits[part].float(), targets[part], reduction="none")
            for part in slices_within_chunk_bytes(token_logits)
        ]
    )


def are_token_logits(model: nn.Module, values: Tensor, rows: Tensor, targets: Tensor) -> bool:
    """Whether logits [b, t, vocab] say what follows in rows, and no class of each or of each of its tokens."""
    known = vocabulary_size(model, decoder=True)
    enough = known is None or values.shape[-1] >= known
    return values.shape[1] - targets.shape[1] in (0, 1) and rows.dim() == 2 and enough


class TotalNll(NamedTuple):
    nats: float
    n_predictions: int


def total_nll(
    model: nn.Module,
    rows: Tensor,
    loss_mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    active: Tensor | None = None,
) -> TotalNll:
    """Nats over all predicted tokens of rows [n, length], and how many there are: n * (length - 1).

    loss_mask   [n, length] bool: which tokens count when they are predicted, all where it is None
    prompt_lengths     [n] how many tokens of each row are its prompt, for models that edit prompts; None: all of it
    active    coordinates of those edits that act; all where it is None
    """
    nats, counts = row_nll(model, rows, loss_mask, prompt_lengths, active)
    return TotalNll(math.fsum(nats), sum(counts))


class RowNll(NamedTuple):
    nats: list[float]
    n_predictions: list[int]


def row_nll(
    model: nn.Module,
    rows: Tensor,
    loss_mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    active: Tensor | None = None,
) -> RowNll:
    """Nats over the predicted tokens of each row, and how many there are: see `total_nll`."""
    sums, counts, first = [], [], 0
    with evaluating(model):
        for batch in iterate_and_report(list(memory_batches(model, rows)), "batches of rows"):
            lengths = None if prompt_lengths is None else prompt_lengths[first : first + len(batch)]
            with prompts(model, lengths, active):
                values = logits(model, batch)  # [b, t, vocab]
            targets, is_token = targets_and_prediction_mask(model, batch.to(values.device))
            if not are_token_logits(model, values, batch, targets):
                raise no_next_token(
                    f"{type(model).__name__} predicts no next token",
                    help="compare it with the original by `divergence` or `agreement`",
                ).rejection()
            for number, (row, ids) in enumerate(zip(values, targets, strict=True), start=first):
                nats = token_losses(row[: len(ids)], ids).cpu().double()  # a slice copies nothing
                if is_token is not None:
                    nats = nats[is_token[number - first].cpu()]
                if loss_mask is not None:
                    nats = nats[loss_mask[number, 1:]]
                sums.append(nats.sum().item())
                counts.append(len(nats))
            first += len(batch)
    return RowNll(sums, counts)


ContextRow = tuple[tuple[int, ...], int]  # tokens that are read, and where what is judged begins


def continuation_logprobs(model: nn.Module, requests: Sequence[tuple[Sequence[int], int]]) -> list[float]:
    """Summed log-probability of ids[begin:] given ids[:begin], begin > 0, for every (ids, begin), in order.

    Rows of similar length run together, padded behind: a causal model does not look there. The last token is predicted
    and never read, so that requests that differ in it alone, as yes and no, share a row.
    """
    log_probs = [0.0] * len(requests)
    sharing: dict[ContextRow, list[int]] = {}
    for i, (tokens, begin) in enumerate(requests):
        sharing.setdefault((tuple(tokens[:-1]), begin), []).append(i)
    rows = sorted(sharing, key=lambda row: len(row[0]))
    with evaluating(model):
        for batch in iterate_and_report(list(_batches_within_logits_bytes(model, rows)), "batches of questions"):
            width = len(batch[-1][0])
            ids = torch.tensor([[*read, *[0] * (width - len(read))] for read, _ in batch])  # [b, t]
            with prompts(model, torch.tensor([begin for _, begin in batch])):
                first = min(begin for _, begin in batch) - 1
                values = last_logits(model, ids, width - first)
            for row_values, (read, begin) in zip(values, batch, strict=True):
                predictive = row_values[begin - 1 - first : len(read) - first]
                for i in sharing[read, begin]:
                    targets = torch.tensor(requests[i][0][begin:], device=values.device)
                    nats = token_losses(predictive, targets)
                    log_probs[i] = -nats.cpu().double().sum().item()  # not all devices have float64
    return log_probs


def _batches_within_logits_bytes(model: nn.Module, rows: Sequence[ContextRow]) -> Iterator[Sequence[ContextRow]]:
    """Rows, shortest first, in batches whose logits fit `BATCH_BYTES`, padded to the longest of each."""
    width, start = vocabulary(model) or 1 << 15, 0
    while start < len(rows):
        end = start + 1
        while (
            end < len(rows)
            and end - start < max_rows_per_forward()
            and ((end - start + 1) * len(rows[end][0]) * width * 4 <= BATCH_BYTES)
        ):
            end += 1
        yield rows[start:end]
        start = end


def finite(value: float, metric_name: str, data_name: str = "") -> float:
    """The value, or `Reject` naming the metric and the data."""
    if math.isfinite(value):
        return value
    over = f" over `{data_name}`" if data_name else ""
    raise not_a_number(
        f"{metric_name}{over} is {'not a number' if math.isnan(value) else 'infinite'}", help=REMEDY
    ).rejection()
