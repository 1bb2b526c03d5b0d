"""Greedy search and sampling over the sequences of an engine: a row that has ended leaves the batch."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...dsl.syntax.diagnostics import Fault, Reject

if TYPE_CHECKING:
    from .model import DecoderModel

bad_sampling = Fault("bad-sampling", "A model was asked to generate by settings that mean nothing.", exit="usage")


class Generation:
    """The loop of one call of `generate`, by transformers' processors, criteria and streamers.

    Source: `GenerationMixin._sample` of transformers, which computes rows that have ended and masks their tokens.

    logits, scores   of each step [b, vocabulary], before and after the processors; zeros of rows that have left
    """

    def __init__(
        self,
        model: "DecoderModel",
        processors: Sequence[Callable[[Tensor, Tensor], Tensor]],
        criteria: Any,
        config: Any,
        streamer: Any = None,
        seed: int | None = None,
    ):
        self.model, self.config, self.streamer = model, config, streamer
        self.processors, self.criteria = processors, criteria
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.logits: tuple[Tensor, ...] = ()
        self.scores: tuple[Tensor, ...] = ()
        pad = config._pad_token_tensor
        self._pad = 0 if pad is None else int(pad)
        self._ends = any(hasattr(one, "eos_token_id") for one in criteria)

    def __call__(self, ids: Tensor, mask: Tensor, begin: Callable[[Sequence[int]], None] = lambda _: None) -> Tensor:
        """The sequences [b, t + new] of prompts [b, t]; `begin` is called with the numbers of the open sequences."""
        prompts = [row[is_token.bool()] for row, is_token in zip(ids, mask, strict=True)]
        if not all(len(prompt) for prompt in prompts):
            raise Reject(bad_sampling("a prompt has no token", help="begin it with the tokenizer's first token"))
        slots = self.model.start_sequences([prompt.tolist() for prompt in prompts])
        numbers, self._sequences = [number for number, _ in slots], ids
        try:
            begin(numbers)
            fresh = {number: prompt[known:] for (number, known), prompt in zip(slots, prompts, strict=True)}
            self._generate_until_done(numbers, fresh, [len(prompt) for prompt in prompts])
        finally:
            new_ids = self._sequences[:, ids.shape[1] :]
            rows = [torch.cat(pair).tolist() for pair in zip(prompts, new_ids, strict=True)]
            lengths = map(self.model.engine.length, numbers)
            self.model.release(numbers, [row[:length] for row, length in zip(rows, lengths, strict=True)])
        if self.streamer is not None:
            self.streamer.end()
        return self._sequences

    def _generate_until_done(
        self, numbers: Sequence[int], new_tokens: dict[int, Tensor], lengths: Sequence[int]
    ) -> None:
        """Append tokens until each row has ended, or has no position for its next token.

        new_tokens     tokens that sequences have not read yet; `lengths` are those of the prompts
        """
        rows = live = list(range(len(numbers)))
        n_new, context = 0, self.model.plan["context"]
        while live:
            logits = self.model.append_tokens(new_tokens, "last")  # [live, vocabulary]
            if len(live) < len(rows):
                logits = logits.new_zeros(len(rows), logits.shape[1]).index_copy(0, torch.tensor(live), logits)
            chosen = self._next_tokens(logits)
            if len(live) < len(rows):
                chosen = torch.full_like(chosen, self._pad).index_copy(0, torch.tensor(live), chosen[live])
            self._sequences = torch.cat([self._sequences, chosen[:, None]], 1)
            n_new += 1
            if self.streamer is not None:
                self.streamer.put(chosen)
            finished = self.criteria(self._sequences, self.scores or None).tolist()
            live = [row for row in live if lengths[row] + n_new <= context and not (self._ends and finished[row])]
            if all(finished[row] for row in live):
                return
            new_tokens = {numbers[row]: self._sequences[row, -1:] for row in live}

    def _next_tokens(self, logits: Tensor) -> Tensor:
        """Tokens [b] for logits [b, vocabulary]."""
        scores = logits.clone() if self.config.output_logits else logits
        for processor in self.processors:  # calling the list would look up the signature of each
            scores = processor(self._sequences, scores)
        if self.config.return_dict_in_generate:
            self.logits += (logits,) if self.config.output_logits else ()
            self.scores += (scores,) if self.config.output_scores else ()
        if not self.config.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0]
