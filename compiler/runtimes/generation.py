"""One call of `generate`: prompts in, tokens out, row by row until each has ended."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...dsl.syntax.diagnostics import Reject
from .sampling import Chooser, Sampling, bad_sampling

if TYPE_CHECKING:
    from .logits_rules import Rules
    from .model import DecoderModel

_TAIL = 8  # tokens more than a stop string has characters are looked at: one may be several


class Generation:
    """Rows that grow together, each in a sequence of its own."""

    def __init__(
        self,
        model: "DecoderModel",
        sampling: Sampling,
        stops: Sequence[str],
        tokenizer: Any,
        streamer: Any,
        keep_logits: bool,
        rules: "Rules | None" = None,
    ):
        if stops and tokenizer is None:
            raise Reject(
                bad_sampling(
                    "stop strings are looked for in text, and there is no tokenizer", help="hand `generate` a tokenizer"
                )
            )
        self.model, self.sampling, self.stops = model, sampling, stops
        self.tokenizer, self.streamer, self.keep_logits = tokenizer, streamer, keep_logits
        self.chooser = Chooser(sampling, rules)

    def __call__(
        self, ids: Tensor, mask: Tensor, begin: Callable[[Sequence[int]], None] = lambda numbers: None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The sequences [b, t + new] and the logits [b, vocabulary] of every step.

        begin   done first with the numbers of the open sequences
        """
        prompts = [row[is_token.bool()] for row, is_token in zip(ids, mask, strict=True)]
        if not all(len(prompt) for prompt in prompts):
            raise Reject(bad_sampling("a prompt has no token", help="begin it with the tokenizer's first token"))
        if self.streamer is not None:
            self.streamer.put(ids.cpu())
        self._prompts = list(prompts)
        slots = self.model.begin([prompt.tolist() for prompt in prompts])
        numbers = [number for number, _ in slots]
        try:
            begin(numbers)
            new_tokens, logits = self._grow(prompts, slots)
        finally:
            sequences_ids = zip(numbers, self._prompts, strict=True)
            self.model.release(numbers, [ids[: self.model.engine.length(n)].tolist() for n, ids in sequences_ids])
        if self.streamer is not None:
            self.streamer.end()
        return torch.cat([ids, new_tokens], 1), logits

    def _grow(self, prompts: list[Tensor], slots: Sequence[tuple[int, int]]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`slots` are sequences, and how many tokens of its prompt each holds."""
        rows, numbers = len(prompts), [number for number, _ in slots]
        live, ids_by_row = list(range(rows)), self._prompts
        new_tokens = torch.empty((rows, 0), dtype=torch.int64)
        all_logits: list[Tensor] = []
        fresh = {number: prompt[known:] for (number, known), prompt in zip(slots, prompts, strict=True)}
        while live:
            logits = self.model.feed(fresh, "last")  # [live, vocabulary]
            if self.keep_logits:
                step = torch.zeros((rows, logits.shape[1]))
                step[live] = logits
                all_logits.append(step)
            chosen = self.chooser.choose(logits, [ids_by_row[row] for row in live], new_tokens.shape[1])
            column = torch.full((rows, 1), self.sampling.pad)
            column[live, 0] = chosen
            new_tokens = torch.cat([new_tokens, column], 1)
            if self.streamer is not None:
                self.streamer.put(column[:, 0])
            for row, token in zip(live, chosen, strict=True):
                ids_by_row[row] = torch.cat([ids_by_row[row], token[None]])
            if new_tokens.shape[1] >= self.sampling.max_new_tokens:
                break
            live = [row for row in live if not self._is_finished(ids_by_row[row], len(prompts[row]))]
            fresh = {numbers[row]: ids_by_row[row][-1:] for row in live}
        return new_tokens, tuple(all_logits)

    def _is_finished(self, ids: Tensor, prompt: int) -> bool:
        if int(ids[-1]) in self.sampling.eos and len(ids) - prompt >= self.sampling.min_new_tokens:
            return True
        if len(ids) > self.model.plan["context"]:
            return True  # its next token would have no position
        if not self.stops:
            return False
        tail = ids[max(prompt, len(ids) - max(map(len, self.stops)) - _TAIL) :]
        text = self.tokenizer.decode(tail.tolist(), skip_special_tokens=False)
        return any(stop in text for stop in self.stops)
