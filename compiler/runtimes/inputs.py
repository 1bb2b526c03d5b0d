"""Inputs of a call of `forward` or `generate`, as models of transformers take them."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss, ForSequenceClassificationLoss

from ...dsl.syntax.diagnostics import Fault
from ..core.options import apply_option_rules, integer_rule, share_rule
from ..core.quantity import with_article
from .generation import invalid_sampling

invalid_inputs = Fault(
    "unfit-inputs",
    "A model over an engine was called with tensors that do not go together.\n\n"
    "`input_ids` are whole numbers [batch, tokens]. `attention_mask` has their shape, or that of all tokens where a "
    "`cache` holds the first of them. `labels` have their shape too, or [batch] of a model that sorts texts.",
    exit="usage",
)

IGNORED = -100  # label of tokens that a loss leaves out; transformers' number
_LIMIT = 2**31
_RULES = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "max_new_tokens", "max_length"), integer_rule(1, _LIMIT)),
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size"), integer_rule(1, _LIMIT)),
    **dict.fromkeys(("min_length", "min_new_tokens"), integer_rule(0, _LIMIT)),
    "top_p": share_rule,  # transformers takes what is beyond 1 as 1
    "seed": integer_rule(-(2**63), 2**64 - 1),  # of a generator of torch
}


def check_token_id_tensor(ids: Any, argument: str = "input_ids") -> None:
    """Raises Reject (unfit-inputs) unless these are whole numbers [batch, tokens]."""
    if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() and not ids.is_complex():
        return
    fact = f"`{argument}` is {_shape_and_dtype_or_type(ids)}, and the model takes whole numbers [batch, tokens]"
    raise invalid_inputs(fact, help='tokenize with `return_tensors="pt"`, or write torch.tensor([[5, 9]])').rejection()


def check_mask(mask: Any, ids: Tensor, past_length: int = 0, argument: str = "attention_mask") -> None:
    """Raises Reject (unfit-inputs) unless a mask is of ids [b, t], or of them and the tokens `past_length` them."""
    shape = tuple(ids.shape[:2])
    if mask is None or (isinstance(mask, Tensor) and tuple(mask.shape) in (shape, (shape[0], past_length + shape[1]))):
        return
    tokens = f"`{argument}` is {_shape_and_dtype_or_type(mask)}, and the tokens are {list(shape)}"
    fact = f"{tokens} behind {past_length} of the cache" if past_length else tokens
    raise invalid_inputs(
        fact, help="give the mask that the tokenizer gave with the tokens, or leave it out"
    ).rejection()


def checked_sampling_options(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `generate` with whole numbers as such, those of a config too. Raises Reject (bad-sampling)."""
    numbers = dict[str, Any]()
    for options in (getattr(config, "__dict__", {}), values):
        stated = {name: options[name] for name in _RULES if options.get(name) is not None}
        numbers = apply_option_rules(stated, _RULES, invalid_sampling)
    return {**values, **numbers}


def next_token_loss(logits: Tensor, labels: Any, mask: Tensor) -> Tensor:
    """Mean cross-entropy of each token by the logits [b, t, vocabulary] of the one before it.

    labels   [b, t], as `input_ids`; one counts where the mask shows its token and the one before
    """
    check_labels(labels, logits, mask.shape)
    visible = mask.bool()
    counted = visible & torch.cat([visible[:, :1], visible[:, :-1]], 1)
    return ForCausalLMLoss(logits, labels.masked_fill(~counted, IGNORED), logits.shape[-1])


def classification_loss(logits: Tensor, labels: Any, mask: Tensor) -> Tensor:
    """Loss of the classes [b, t] of tokens that the mask shows, by logits [b, t, n], or of texts by logits [b, n]."""
    if logits.dim() == 3:
        check_labels(labels, logits, mask.shape)
        return ForMaskedLMLoss(logits, labels.masked_fill(~mask.bool(), IGNORED), logits.shape[-1])
    several = isinstance(labels, Tensor) and labels.is_floating_point() and logits.shape[1] > 1
    check_labels(labels, logits, logits.shape if several else logits.shape[:1])
    config = SimpleNamespace(num_labels=logits.shape[1], problem_type=None)  # it follows from the dtype of labels
    return ForSequenceClassificationLoss(labels, logits, config)


def check_labels(labels: Any, logits: Tensor, expected_shape: torch.Size) -> None:
    """Raises Reject (unfit-inputs) unless labels have that shape, and are classes of the logits or ignored."""
    problem = f"`labels` is {_shape_and_dtype_or_type(labels)}, and labels of these inputs are {list(expected_shape)}"
    if isinstance(labels, Tensor) and labels.shape == expected_shape:
        counted = labels[labels != IGNORED]
        if labels.is_floating_point() or not counted.numel() or 0 <= counted.min() <= counted.max() < logits.shape[-1]:
            return
        problem = f"`labels` holds a number that is none of the {logits.shape[-1]} that the model tells apart"
    raise invalid_inputs(problem, help=f"give one label a token or text, {IGNORED} where none counts").rejection()


def _shape_and_dtype_or_type(value: Any) -> str:
    """`[2, 5] float32` of a tensor, else the type's name."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return with_article(type(value).__name__)
