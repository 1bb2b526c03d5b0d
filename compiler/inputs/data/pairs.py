"""Prompts and their answers, a row each."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ....dsl.syntax.diagnostics import Fault
from ...plugin.context import Context
from ...plugin.interfaces import param
from ..records import Record, drop_or_refuse_too_long, field_text, parse_each
from ..sampled_rows import SampledRows
from ..windows import encode, padding_token_id, require_tokenizer, start_token_id

pair_too_long = Fault("pair-too-long", "A prompt with its answer has more tokens than a row.")
empty_pair = Fault("empty-pair", "A prompt or an answer has no text, so that nothing can be learned from it.")


@dataclass(frozen=True)
class _Pair:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def _n_row_tokens(pair: _Pair, two_sided: bool) -> int:
    """Tokens of a row that a pair needs."""
    lengths = len(pair.prompt), len(pair.answer)
    return 2 * max(lengths) if two_sided else sum(lengths)


class Pairs(SampledRows):
    """Prompts and their answers, a row each.

    A record is a prompt and an answer in two fields. A row is the prompt, what joins the two, the answer and the end
    token, filled up behind to `length` tokens. `tune.reft` learns to say the answers and edits hidden states of the
    prompts alone; `tune.heal(learn: responses)` learns the answers of the same rows. Rows of `text` have no such
    parts, those of `chat` several in a row.

    For an encoder with a decoder the prompt is the source and the answer the target, each with the special tokens that
    the tokenizer puts there and filled up to half of `length`; `join` has no place between them.

    Source: own.
    Example: data arc = pairs("arc.json", prompt: "instruction", answer: "output", length: 160)
    """

    prompted = True
    padded = True

    path: str | tuple[str, ...] = param("JSONL, JSON, CSV or TSV file, glob, or list of them.", positional=True)
    prompt: str = param("Field of the prompt.", default="prompt")
    answer: str = param("Field of the answer.", default="answer")
    join: str = param("What stands between them; it begins the answer.", default="\n", lines=True)
    length: int = param("Tokens in a row.", ge=2, unit="tokens")
    longer: Literal["refuse", "drop"] = param("What becomes of pairs that fit into no row.", default="refuse")

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        fill = padding_token_id(tokenizer, ctx)
        if self._is_encoder_decoder(ctx):
            half = self.length // 2
            return self._padded_sampled_rows(
                tokenizer, ctx, lambda pair: (*pair.prompt, *(fill,) * (half - len(pair.prompt)), *pair.answer), fill
            )
        return self._padded_sampled_rows(tokenizer, ctx, lambda pair: (*pair.prompt, *pair.answer), fill)

    def assistant_masks(self, tokenizer: Any, ctx: Context) -> Iterator[Any] | None:
        if self._is_encoder_decoder(ctx):
            return None  # all of a target is learned, and nothing of a source
        return self._padded_sampled_rows(
            tokenizer, ctx, lambda pair: (*(0,) * len(pair.prompt), *(1,) * len(pair.answer)), 0
        )

    def prompts(self, tokenizer: Any, ctx: Context) -> Iterator[int] | None:
        if self._is_encoder_decoder(ctx):
            return None
        return (
            int(row.sum()) for row in self._padded_sampled_rows(tokenizer, ctx, lambda pair: (1,) * len(pair.prompt), 0)
        )

    def _padded_sampled_rows(self, tokenizer: Any, ctx: Context, row_values_of: Any, pad_id: int) -> Iterator[Any]:
        """A row of numbers for each pair that is chosen: what `row_values_of` says of its tokens, then `pad_id`."""
        import torch

        rows = [row_values_of(pair) for pair in self._read_pairs(tokenizer, ctx)]
        full = torch.tensor([[*row, *(pad_id,) * (self.length - len(row))] for row in rows], dtype=torch.int64)
        return self.sample(full, ctx)

    def _read_pairs(self, tokenizer: Any, ctx: Context) -> list[_Pair]:
        tokenizer = require_tokenizer(tokenizer, ctx)
        two_sided = self._is_encoder_decoder(ctx)
        parse = self._parse_source_and_target if two_sided else self._parse_pair
        records = self.records((self.prompt, self.answer), ctx)
        pairs = parse_each(records, lambda entry: parse(*entry, tokenizer))
        sizes = [_n_row_tokens(pair, two_sided) for pair in pairs]
        return drop_or_refuse_too_long(pairs, sizes, self.length, self.longer, pair_too_long, "pairs")

    def _parse_pair(self, record: Record, line_number: int, path: Path, tokenizer: Any) -> _Pair:
        start = start_token_id(tokenizer, "auto")
        prompt = encode(field_text(record, self.prompt, line_number, path), tokenizer)
        answer = encode(self.join + field_text(record, self.answer, line_number, path), tokenizer)
        if not prompt or not answer:
            which = "prompt" if answer else "answer"
            raise empty_pair(f"the {which} of record {line_number} of {path} is empty").rejection()
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return _Pair((*([] if start is None else [start]), *prompt), (*answer, *end))

    def _parse_source_and_target(self, record: Record, line_number: int, path: Path, tokenizer: Any) -> _Pair:
        source = tokenizer(field_text(record, self.prompt, line_number, path), verbose=False)["input_ids"]
        target = tokenizer(text_target=field_text(record, self.answer, line_number, path), verbose=False)["input_ids"]
        if not source or not target:
            which = "prompt" if target else "answer"
            raise empty_pair(f"the {which} of record {line_number} of {path} is empty").rejection()
        return _Pair(tuple(source), tuple(target))

    def _is_encoder_decoder(self, ctx: Context) -> bool:
        from ...models.rows.inputs import is_encoder_decoder_config

        return is_encoder_decoder_config(ctx.origin.config)
