"""The next token: greedy, or drawn by temperature, top-k, top-p and repetition penalty, as in transformers."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...dsl.syntax.diagnostics import Fault, Reject

if TYPE_CHECKING:
    from .logits_rules import Rules

bad_sampling = Fault("bad-sampling", "A model was asked to generate by settings that mean nothing.", exit="usage")


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters and stopping criteria.

    temperature, top_k, top_p   of `do_sample`; 1.0, 0 and 1.0 change nothing
    repetition_penalty          above 1.0, tokens that occurred become less likely
    eos                         tokens that end a sequence
    seed                        of the draw; None uses torch's generator as it stands
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos: tuple[int, ...] = ()
    pad: int = 0
    seed: int | None = None

    def checked(self) -> "Sampling":
        problems = [
            text
            for is_invalid, text in (
                (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}, and at least one is generated"),
                (
                    self.do_sample and not self.temperature > 0,
                    f"temperature is {self.temperature}, and must be above 0 where tokens are drawn",
                ),
                (self.top_k < 0, f"top_k is {self.top_k}, and 0 takes all tokens"),
                (not 0 < self.top_p <= 1, f"top_p is {self.top_p}, which is no share above 0"),
                (
                    not self.repetition_penalty > 0,
                    f"repetition_penalty is {self.repetition_penalty}, and must be above 0",
                ),
            )
            if is_invalid
        ]
        if problems:
            raise Reject(*(bad_sampling(text) for text in problems))
        return self

    def overlaid(self, **overrides: Any) -> "Sampling":
        """With what is not None in place of what is there."""
        return replace(self, **{name: value for name, value in overrides.items() if value is not None})

    @staticmethod
    def of_config(config: Any) -> "Sampling":
        """Sampling of a generation config, an object or a mapping with transformers' names."""
        read = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
        named = {f.name: read(f.name) for f in fields(Sampling) if f.name not in ("eos", "pad", "seed")}
        return Sampling().overlaid(**named, eos=as_tokens(read("eos_token_id")), pad=read("pad_token_id"))


def as_tokens(value: Any) -> tuple[int, ...] | None:
    """An eos setting as a tuple; None where none is set."""
    if value is None:
        return None
    return tuple(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))


class Chooser:
    """Chooses tokens for the rows of one generation; `rules` come after lengths and before a choice."""

    def __init__(self, sampling: Sampling, rules: "Rules | None" = None):
        self.sampling, self.rules = sampling, rules
        self.generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor, ids_by_row: Sequence[Tensor], n_new: int) -> Tensor:
        """Tokens [rows] for logits [rows, vocabulary]; `ids_by_row` is what each row holds, `n_new` of it new."""
        s = self.sampling
        scores = logits
        if s.repetition_penalty != 1.0 or (n_new < s.min_new_tokens and s.eos):
            scores = logits.clone()
        if s.repetition_penalty != 1.0:
            for row, ids in zip(scores, ids_by_row, strict=True):
                values = row[ids]
                penalty = s.repetition_penalty
                row[ids] = torch.where(values < 0, values * penalty, values / penalty)
        if n_new < s.min_new_tokens and s.eos:
            scores[:, [end for end in s.eos if end < scores.shape[1]]] = -torch.inf  # others are never drawn
        if self.rules is not None:  # of rows that begin alike and grow together
            scores = self.rules(torch.stack(list(ids_by_row)), scores.clone())
        if not s.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(self.probabilities(scores), 1, generator=self.generator)[:, 0]

    def probabilities(self, scores: Tensor) -> Tensor:
        s = self.sampling
        scores = scores / s.temperature
        if 0 < s.top_k < scores.shape[-1]:
            least = scores.topk(s.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if s.top_p < 1.0:
            ordered, order = scores.sort(descending=False)
            less = ordered.softmax(-1).cumsum(-1) <= 1 - s.top_p
            less[:, -1] = False  # the likeliest stays
            scores = scores.masked_fill(less.scatter(1, order, less), -torch.inf)
        return scores.softmax(-1)
