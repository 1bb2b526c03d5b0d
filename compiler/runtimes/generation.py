"""Greedy search and sampling over the sequences of an engine: a row that has ended leaves the batch."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ...dsl.syntax.diagnostics import Fault
from ..core.json_errors import reject_on_error
from ..models.checkpoints.generation_config import NAME, invalid_generation
from .speculation import LONGEST, MAX_LONGEST, PromptLookup

if TYPE_CHECKING:
    from .model import DecoderModel

_DRAFTS = ("prompt_lookup_num_tokens", "max_matching_ngram_size")

invalid_sampling = Fault("bad-sampling", "A model was asked to generate by settings that mean nothing.", exit="usage")


class Generation:
    """The loop of one call of `generate`, by transformers' processors, criteria and streamers.

    Where the config has `prompt_lookup_num_tokens`, and there is one row, the model verifies drafts of the row's own
    n-grams. Processors, criteria and streamer hear of each token alone, as they do without drafts.

    Source: `GenerationMixin._sample` of transformers, which computes rows that have ended and masks their tokens.

    logits, scores   of each step [b, vocabulary], before and after the processors; zeros of rows that have left
    """

    def __init__(
        self,
        model: "DecoderModel",
        logits_processors: Sequence[Callable[[Tensor, Tensor], Tensor]],
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        seed: int | None = None,
    ):
        self.model, self.config, self.streamer = model, generation_config, streamer
        self.processors, self.criteria = logits_processors, stopping_criteria
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.logits: tuple[Tensor, ...] = ()
        self.scores: tuple[Tensor, ...] = ()
        pad = generation_config._pad_token_tensor
        self._pad = 0 if pad is None else int(pad)
        self._ends = any(hasattr(one, "eos_token_id") for one in stopping_criteria)

    def __call__(
        self,
        prompt_ids: Tensor,
        attention_mask: Tensor,
        on_sequences_open: Callable[[Sequence[int]], None] = lambda _: None,
    ) -> Tensor:
        """The sequences [b, t + new] of prompts [b, t]; `on_sequences_open` is called with the open sequences."""
        prompts = [row[is_token.bool()] for row, is_token in zip(prompt_ids, attention_mask, strict=True)]
        if not all(len(prompt) for prompt in prompts):
            raise invalid_sampling(
                "a prompt has no token", help="begin it with the tokenizer's first token"
            ).rejection()
        slots = self.model.start_sequences([prompt.tolist() for prompt in prompts])
        sequences, self._sequences = [sequence for sequence, _ in slots], prompt_ids
        self._index_prompt_for_lookup(prompts)
        try:
            on_sequences_open(sequences)
            fresh = {sequence: prompt[known:] for (sequence, known), prompt in zip(slots, prompts, strict=True)}
            self._generate_until_done(sequences, fresh, [len(prompt) for prompt in prompts])
        finally:
            new_ids = self._sequences[:, prompt_ids.shape[1] :]
            rows = [torch.cat(pair).tolist() for pair in zip(prompts, new_ids, strict=True)]
            lengths = map(self.model.engine.length, sequences)
            self.model.release(sequences, [row[:length] for row, length in zip(rows, lengths, strict=True)])
        if self.streamer is not None:
            self.streamer.end()
        return self._sequences

    def _index_prompt_for_lookup(self, prompts: Sequence[Tensor]) -> None:
        """Index the prompt where drafts are asked for. Rows of a batch would accept different numbers of tokens."""
        config = self.config
        self._text: list[int] = []
        self._lookup: PromptLookup | None = None
        if config.prompt_lookup_num_tokens and len(prompts) == 1:
            self._text = prompts[0].tolist()
            longest = min(config.max_matching_ngram_size or LONGEST, MAX_LONGEST)
            self._lookup = PromptLookup(self._text, self.model.call_costs, longest)

    def _generate_until_done(
        self, sequences: Sequence[int], new_tokens: dict[int, Tensor], lengths: Sequence[int]
    ) -> None:
        """Append tokens until each row has ended, or has no position for its next token.

        new_tokens     tokens that sequences have not read yet; `lengths` are those of the prompts
        """
        live, self._n_new = list(range(len(sequences))), 0
        self._positions = [self.model.plan["context"] - length for length in lengths]
        while live:
            draft = self._draft_tokens()
            start, n_before = time.thread_time(), self._n_new
            logits = self._logits_of(new_tokens, draft)
            seconds = time.thread_time() - start
            try:
                live = self._append_tokens_and_list_live_rows(draft, logits, live)
            finally:
                if draft and self._n_new <= n_before + len(draft):  # tokens behind the text's last but one are rejected
                    start = time.thread_time()
                    self.model.forget(sequences[0], lengths[0] + self._n_new - 1)
                    seconds += time.thread_time() - start
            if self._lookup is not None and n_before:
                self.model.call_costs.observe(len(draft) + 1, seconds)
            if self._lookup is not None and draft:
                self._lookup.observe(draft, self._n_new - n_before - 1, seconds)
            new_tokens = {sequences[row]: self._sequences[row, -1:] for row in live}

    def _append_tokens_and_list_live_rows(self, draft: list[int], logits: Tensor, live_rows: list[int]) -> list[int]:
        """Append the next token of each live row and, while it is the draft's, those behind it; the rows that are to
        have another.

        logits   [live, vocabulary], with a draft [draft + 1, vocabulary] of one row
        """
        for position, expected in enumerate((*draft, None)):
            self._append_next_tokens(logits[position : position + 1] if draft else logits, live_rows)
            finished = self.criteria(self._sequences, self.scores or None).tolist()
            live_rows = [
                row for row in live_rows if self._n_new <= self._positions[row] and not (self._ends and finished[row])
            ]
            if all(finished[row] for row in live_rows):
                return []
            if draft and self._text[-1] != expected:
                break
        return live_rows

    def _draft_tokens(self) -> list[int]:
        """Tokens that may follow the only row's last one; none behind its prompt, which is read alone."""
        if self._lookup is None or not self._n_new:
            return []
        config, length = self.config, self._sequences.shape[1]
        limits = config.prompt_lookup_num_tokens, config.max_length - length - 1, self._positions[0] - self._n_new
        return self._lookup.draft(min(limits))

    def _logits_of(self, new_tokens: dict[int, Tensor], draft: list[int]) -> Tensor:
        """Logits behind the last token of each row and each of a draft."""
        if self._lookup is None:
            return self.model.append_tokens(new_tokens, "last")
        ((number, ids),) = new_tokens.items()
        row = torch.cat([ids, ids.new_tensor(draft)]) if draft else ids
        return self.model.append_tokens({number: row}, len(draft) + 1)

    def _append_next_tokens(self, logits: Tensor, live_rows: Sequence[int]) -> None:
        """Choose the next token of each live row by logits [live, vocabulary]."""
        rows = len(self._sequences)
        if len(live_rows) < rows:
            logits = logits.new_zeros(rows, logits.shape[1]).index_copy(0, torch.tensor(live_rows), logits)
        chosen = self._next_tokens(logits)
        if len(live_rows) < rows:
            chosen = torch.full_like(chosen, self._pad).index_copy(0, torch.tensor(live_rows), chosen[live_rows])
        self._sequences = torch.cat([self._sequences, chosen[:, None]], 1)
        self._n_new += 1
        if self._lookup is not None:
            self._text.append(int(chosen[0]))
        if self.streamer is not None:
            self.streamer.put(chosen)

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


def parse_generation_config(values: Mapping[str, Any]) -> GenerationConfig:
    """The values that transformers knows, but those that ask for layers of torch, or for drafts, which are the caller's
    to ask for. Raises Reject (bad-generation-config) where they mean nothing to it."""
    known = vars(GenerationConfig()).keys() - {"assistant_early_exit", "use_mtp", "dola_layers", *_DRAFTS}
    with reject_on_error(invalid_generation, NAME):
        return GenerationConfig(**{n: x for n, x in values.items() if n in known and not isinstance(x, Mapping)})
