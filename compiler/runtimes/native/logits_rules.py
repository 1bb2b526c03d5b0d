"""Rules of a generation config that change scores before a token is chosen, as encoders with a decoder come with.

They are transformers' own processors, so that a token is barred or forced exactly where it is there.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Reject
from .sampling import as_tokens, bad_sampling

Rules = Callable[[Tensor, Tensor], Tensor]  # tokens of rows [rows, t], scores [rows, vocabulary] -> scores


def build_rules(read: Callable[[str], Any], prompt_length: int, max_length: int, vocabulary: int) -> Rules | None:
    """Rules applied to logits; None where there are none. Raises Reject where a token is none of the vocabulary.

    read    the value of a setting of generation, by its name
    prompt_length   tokens that a target has before one is chosen; `max_length` that it has in the end
    """
    from transformers.generation import logits_process as known

    def ids(name: str) -> list[int]:
        value = read(name)
        tokens = list(as_tokens(value) or ()) if not _is_nested(value) else [t for word in value for t in word]
        if (
            "suppress" in name
        ):  # what is not there is not said: configs keep those of the vocabulary that they began with
            tokens = [token for token in tokens if 0 <= token < vocabulary]
        if any(not 0 <= token < vocabulary for token in tokens):
            raise Reject(bad_sampling(f"`{name}` names a token that is none of the {vocabulary}"))
        return tokens

    def processors() -> Iterator[Any]:
        if read("no_repeat_ngram_size"):
            yield known.NoRepeatNGramLogitsProcessor(int(read("no_repeat_ngram_size")))
        if ids("bad_words_ids"):
            eos = torch.tensor(ids("eos_token_id")) if ids("eos_token_id") else None
            yield known.NoBadWordsLogitsProcessor(read("bad_words_ids"), eos)
        if ids("forced_bos_token_id"):
            yield known.ForcedBOSTokenLogitsProcessor(ids("forced_bos_token_id")[0])
        if ids("forced_eos_token_id"):
            yield known.ForcedEOSTokenLogitsProcessor(max_length, ids("forced_eos_token_id"))
        if ids("suppress_tokens"):
            yield known.SuppressTokensLogitsProcessor(ids("suppress_tokens"))
        if ids("begin_suppress_tokens"):
            first = prompt_length + (prompt_length == 1 and bool(ids("forced_bos_token_id")))
            yield known.SuppressTokensAtBeginLogitsProcessor(ids("begin_suppress_tokens"), first)

    processor_list = known.LogitsProcessorList(processors())
    rules: Callable[..., Tensor] = processor_list
    return (lambda ids_so_far, scores: rules(ids_so_far, scores)) if processor_list else None


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(part, list) for part in value)
