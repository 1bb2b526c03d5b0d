"""One call of `generate`: prompts in, tokens out, row by row until each has ended."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Reject
from .sampling import Chooser, Sampling, bad_sampling

if TYPE_CHECKING:
    from .logits_rules import Rules
    from .model import NativeModel

_TAIL = 8  # tokens more than a stop string has characters are looked at: one may be several


class Generation:
    """Rows that grow together, each in a sequence of its own."""

    def __init__(
        self,
        model: "NativeModel",
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
        prompts = [row[seen.bool()] for row, seen in zip(ids, mask, strict=True)]
        if not all(len(prompt) for prompt in prompts):
            raise Reject(bad_sampling("a prompt has no token", help="begin it with the tokenizer's first token"))
        if self.streamer is not None:
            self.streamer.put(ids.cpu())
        self._held = list(prompts)
        taken = self.model.begin([prompt.tolist() for prompt in prompts])
        numbers = [number for number, _ in taken]
        try:
            begin(numbers)
            made, logits = self._grow(prompts, taken)
        finally:
            held = zip(numbers, self._held, strict=True)
            self.model.give_back(numbers, [ids[: self.model.engine.length(n)].tolist() for n, ids in held])
        if self.streamer is not None:
            self.streamer.end()
        return torch.cat([ids, made], 1), logits

    def _grow(self, prompts: list[Tensor], taken: Sequence[tuple[int, int]]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`taken` are sequences, and how many tokens of its prompt each holds."""
        rows, numbers = len(prompts), [number for number, _ in taken]
        live, held = list(range(rows)), self._held
        made = torch.empty((rows, 0), dtype=torch.int64)
        every: list[Tensor] = []
        fresh = {number: prompt[known:] for (number, known), prompt in zip(taken, prompts, strict=True)}
        while live:
            logits = self.model.feed(fresh, "last")  # [live, vocabulary]
            if self.keep_logits:
                step = torch.zeros((rows, logits.shape[1]))
                step[live] = logits
                every.append(step)
            chosen = self.chooser.choose(logits, [held[row] for row in live], made.shape[1])
            column = torch.full((rows, 1), self.sampling.pad)
            column[live, 0] = chosen
            made = torch.cat([made, column], 1)
            if self.streamer is not None:
                self.streamer.put(column[:, 0])
            for row, token in zip(live, chosen, strict=True):
                held[row] = torch.cat([held[row], token[None]])
            if made.shape[1] >= self.sampling.max_new_tokens:
                break
            live = [row for row in live if not self._ended(held[row], len(prompts[row]))]
            fresh = {numbers[row]: held[row][-1:] for row in live}
        return made, tuple(every)

    def _ended(self, held: Tensor, prompt: int) -> bool:
        if int(held[-1]) in self.sampling.eos and len(held) - prompt >= self.sampling.min_new_tokens:
            return True
        if len(held) > self.model.plan["context"]:
            return True  # its next token would have no position
        if not self.stops:
            return False
        tail = held[max(prompt, len(held) - max(map(len, self.stops)) - _TAIL) :]
        text = self.tokenizer.decode(tail.tolist(), skip_special_tokens=False)
        return any(stop in text for stop in self.stops)
