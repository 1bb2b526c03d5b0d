"""A model that the native engine runs, with the calls that models of transformers have."""

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ....dsl.syntax.diagnostics import Fault, Reject
from .generation import Generation
from .position_offsets import refuse_visible_padding
from .sampling import Sampling, as_tokens
from .sequence_pool import SequencePool

context_full = Fault(
    "context-full",
    "A sequence has more tokens than the model has positions.\n\n"
    "The engine computes up to the longest context that the model's config states.",
    exit="usage",
)
unknown_token = Fault("unknown-token", "A token id is given that a model does not have.", exit="usage")
too_many_sequences = Fault(
    "too-many-sequences", "More sequences are open at once than the engine was loaded for.", exit="usage"
)


READS_PADDING = "reads_padding"  # among the facts: the model was given masks and did not read them


no_states = Fault(
    "no-states",
    "A native model, or one by a graph as ONNX's, is asked for what it does not keep.\n\n"
    "It gives what comes out of its last step: no hidden states of layers, no attentions. The artifact's other forms, "
    "such as `hf`, give them.",
    exit="usage",
)


class Output(dict):
    """`logits` [b, t, vocabulary] float32 and, where asked for, `cache`; keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        keys_text = " and ".join(f"`{key}`" for key in self)
        raise AttributeError(
            f"the native engine gives {keys_text}, and no `{name}`: the target `hf` writes a model that may"
        )


def refuse_states(reason: str = "the native engine does not keep", /, **flags: bool | None) -> None:
    """Raises Reject where a call wants hidden states of layers, or attentions."""
    for name in (name for name, flag in flags.items() if flag):
        raise Reject(
            no_states(
                f"`{name}` asks for what {reason}", help="leave it out, or emit the model with `hf` too and load that"
            )
        )


def check_known(ids: Tensor, vocabulary: int) -> None:
    """Raises Reject where a token is none of so many."""
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise Reject(
            unknown_token(
                f"a token id is outside of the {vocabulary} that the model has",
                help="use the tokenizer that lies beside the weights",
            )
        )


class Sequences:
    """Open sequences of an engine: a cache that goes with its last user."""

    def __init__(self, model: "NativeModel", count: int):
        self.numbers = model.take(count)
        self._model = model

    def get_seq_length(self, layer: int = 0) -> int:
        return max(self._model.engine.length(number) for number in self.numbers)

    def close(self) -> None:
        numbers, self.numbers = self.numbers, []
        self._model.release(numbers)

    def __del__(self):
        if sys is not None and not sys.is_finalizing():  # when the interpreter ends, modules are gone
            self.close()


class NativeModel(nn.Module):
    """Logits and generation by an engine; not trainable, on the CPU.

    engine      runs flat batches of tokens (`kernels.engine.Engine`)
    plan        what it runs
    weights     the tensors that it reads; buffers, so that their bytes are counted
    facts       what the artifact says of the model that it was
    remembers   tokens of earlier prompts that free sequences hold, for prompts that begin alike
    stored_bytes  bytes of the weights in their file; None where they are those of its buffers
    owner       of what sequences hold: another name where weights change
    """

    stored_bytes: int | None = None
    owner = ""

    def __init__(
        self,
        engine: Any,
        plan: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        sequences: int,
        generation: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        remembers: int = 0,
    ):
        super().__init__()
        self.engine, self.plan, self.facts, self.tokenizer = engine, plan, facts, tokenizer
        self.weights = nn.Module()
        for name, tensor in weights.items():
            self.weights.register_buffer(name.replace(".", "/"), tensor)
        self.config = SimpleNamespace(
            vocab_size=plan["vocabulary"],
            max_position_embeddings=plan["context"],
            model_type=facts.get("model_type", ""),
            _name_or_path="",
        )
        self.config.get_text_config = lambda decoder=True: self.config
        settings = {"eos_token_id": None, "pad_token_id": None, **(generation or {})}
        self.generation_config = SimpleNamespace(**settings)
        skipped = facts.get("uncounted")
        self.uncounted = skipped if type(skipped) is int else None
        self.name_or_path = ""
        self.n_params: int | None = facts.get("params")
        self._pool = SequencePool(engine, sequences, remembers)
        self._lock, self._process = threading.RLock(), os.getpid()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def can_generate(self) -> bool:
        return True

    # -- sequences -------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One thread at a time: an engine runs one call. Who held the lock in a parent process is not here."""
        if self._process != os.getpid():
            self._lock, self._process = threading.RLock(), os.getpid()
        with self._lock:
            yield

    def take(self, count: int) -> list[int]:
        """Numbers of sequences that are free; Reject where the engine has no more."""
        return [number for number, _ in self.begin([()] * count)]

    def begin(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """A sequence for each prompt, and how many of its first tokens it holds already."""
        with self._exclusive():
            if len(prompts) > self.spare:
                raise Reject(
                    too_many_sequences(
                        f"{len(prompts)} more sequences are asked for, and {self.spare} are free",
                        help="load the artifact with a larger `sequences=`, or close what is open",
                    )
                )
            return [self._pool.take(prompt, self.owner) for prompt in prompts]

    def release(self, numbers: Sequence[int], token_ids: Sequence[Sequence[int]] = ()) -> None:
        """Free sequences; `token_ids` are the tokens that each has, where they may be gone on with."""
        with self._exclusive():
            for number, ids in zip(numbers, token_ids or [()] * len(numbers), strict=True):
                self._pool.release(number, ids, self.owner)

    @contextmanager
    def sequences_of(self, count: int) -> Iterator[list[int]]:
        numbers = self.take(count)
        try:
            yield numbers
        finally:
            self.release(numbers)

    @property
    def spare(self) -> int:
        """Number of sequences that can still be opened."""
        return len(self._pool)

    def feed(self, rows: Mapping[int, Tensor], outputs: str | int) -> Tensor:
        """Extend sequences by tokens; logits of the last or the first of each row, of so many of its last, or of "all",
        row by row."""
        for number, ids in rows.items():
            length = self.engine.length(number) + len(ids)
            if length > self.plan["context"]:
                raise Reject(
                    context_full(
                        f"a sequence of {length} tokens is longer than the model's context of {self.plan['context']}",
                        help="give it fewer tokens, or ask for fewer new ones",
                    )
                )
        ids = torch.cat(list(rows.values()))
        check_known(ids, self.plan["vocabulary"])
        numbers = [number for number, ids in rows.items() for _ in range(len(ids))]
        if outputs == "first":
            mask = [i == 0 for ids in rows.values() for i in range(len(ids))]
        else:
            count = outputs if isinstance(outputs, int) else {"all": len(ids), "last": 1}[outputs]
            mask = [i >= len(ids) - count for ids in rows.values() for i in range(len(ids))]
        with self._exclusive():
            return self.engine.run(ids.tolist(), numbers, mask)

    def _text(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Mask of text tokens; all where the original model treats padding as text."""
        return torch.ones_like(ids) if mask is None or self.facts.get(READS_PADDING) is True else mask

    # -- what transformers' models have ----------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Sequences | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Output:
        """Logits [b, t, vocabulary]; of masked tokens zeros. Positions are those of a sequence's own tokens."""
        refuse_states(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        length = input_ids.shape[1]
        mask = self._text(input_ids, attention_mask)[:, -length:]
        if position_ids is None and cache is None:  # what goes on from a cache is counted as `generate` does
            refuse_visible_padding(input_ids, mask, self.uncounted)
        keep = min(logits_to_keep or input_ids.shape[1], input_ids.shape[1])
        logits = torch.zeros((len(input_ids), keep, self.plan["vocabulary"]))
        if cache is None and use_cache:
            cache = Sequences(self, len(input_ids))
        if cache is not None:
            for row, number in enumerate(cache.numbers):
                self._fill(logits[row], input_ids[row], mask[row], number)
            return Output(logits=logits, cache=cache)
        for row in range(len(input_ids)):  # row by row: the logits of one fit in memory
            token_ids = input_ids[row][mask[row].bool()].tolist()
            ((number, known),) = self.begin([token_ids[: max(0, len(token_ids) - keep + 1)]])
            final_ids: list[int] = []  # where it breaks off, nobody goes on with what is there
            try:
                self._fill(logits[row], input_ids[row], mask[row], number, known)
                final_ids = token_ids
            finally:
                self.release([number], [final_ids])
        return Output(logits=logits)

    def _fill(self, logits: Tensor, ids: Tensor, mask: Tensor, number: int, known: int = 0) -> None:
        """The last logits [keep, vocabulary] of a row, of which the sequence holds the first tokens that are seen."""
        is_token = mask.bool()
        if not is_token.any():
            return
        values = self.feed({number: ids[is_token][known:]}, len(logits))
        last = is_token.nonzero()[-len(logits) :, 0] - (len(ids) - len(logits))
        last = last[last >= 0]
        logits[last] = values[len(values) - len(last) :]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        streamer: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        return_dict_in_generate: bool | None = None,
        output_logits: bool | None = None,
    ) -> Any:
        """Tokens [b, t + new], prompts left-padded under `attention_mask`, or with
        `return_dict_in_generate` an object with `sequences` and, with `output_logits`, `logits` step by step.

        A row ends at an eos token, a stop string or the model's context. `seed` makes draws repeatable;
        without one they follow torch's generator. Interrupted, it leaves the engine ready for the next call.
        """
        config = generation_config if generation_config is not None else self.generation_config
        if eos_token_id is None and getattr(config, "eos_token_id", None) is None:
            eos_token_id = self.generation_config.eos_token_id  # as transformers fills up a config
        sampling = (
            Sampling.of_config(config)
            .overlaid(
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                do_sample=do_sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                eos=as_tokens(eos_token_id),
                pad=pad_token_id,
                seed=seed,
            )
            .checked()
        )
        stops = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
        mask = self._text(input_ids, attention_mask)
        as_object = return_dict_in_generate
        if as_object is None:
            as_object = getattr(config, "return_dict_in_generate", False)
        keep = getattr(config, "output_logits", False) if output_logits is None else output_logits
        run = Generation(self, sampling, stops, tokenizer or self.tokenizer, streamer, bool(keep))
        sequences, logits = run(input_ids, mask)
        if not as_object:
            return sequences
        return Output(sequences=sequences, logits=logits) if keep else Output(sequences=sequences)
