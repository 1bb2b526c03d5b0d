"""An encoder with a decoder that the native engine runs: it reads a source, and says a target."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault, Reject
from .generation import Generation
from .logits_rules import build_rules
from .model import NativeModel, Output, Sequences, check_known, context_full, refuse_states
from .plan_files import native_damaged
from .position_offsets import refuse_visible_padding
from .sampling import Sampling, as_tokens, bad_sampling

no_target = Fault("no-target", "An encoder with a decoder is called without what its decoder has said.", exit="usage")


class NativeSeq2Seq(NativeModel):
    """`logits` [b, t, vocabulary] of targets [b, t] behind sources [b, s], and `generate`, which says targets.

    Sources may be filled up on either side, under their mask: positions are those of a source's own tokens. What the
    encoder makes of one is computed once, and kept for every token that is said of it. One beam.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "remembers": 0})  # targets that begin alike have other sources
        start, pad = self.facts.get("start"), self.facts.get("pad")
        if type(start) is not int or not 0 <= start < self.plan["vocabulary"]:
            raise Reject(native_damaged("plan.json names no token that a target begins with", help="compile again"))
        self.config.is_encoder_decoder, self.config.decoder_start_token_id = True, start
        self.config.pad_token_id = pad if type(pad) is int else None
        self.config.max_position_embeddings = self.engine.sources

    # -- sources ---------------------------------------------------------------------------------------------

    def sources_of(self, sources: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Each source of a batch alone."""
        if not sources.is_floating_point():  # of tokens, not of sounds
            refuse_visible_padding(sources, mask, self.uncounted)
        return rows_of(sources, mask)

    def encode(self, numbers: Sequence[int], sources: Sequence[Tensor]) -> None:
        """Read sources, each into an open sequence that has none yet."""
        longest = max(len(ids) for ids in sources)
        if longest > self.engine.sources:
            raise Reject(
                context_full(
                    f"a source of {longest} tokens is longer than the {self.engine.sources} that the encoder reads",
                    help="give it a part of the text at a time",
                )
            )
        if not min(len(ids) for ids in sources):
            raise Reject(bad_sampling("a source has no token", help="end it with the tokenizer's last token"))
        ids = torch.cat(list(sources))
        check_known(ids, self.engine.source_vocabulary)
        with self._exclusive():
            owners = [number for number, ids in zip(numbers, sources, strict=True) for _ in range(len(ids))]
            self.engine.encode(ids.tolist(), owners)

    # -- what transformers' models have ----------------------------------------------------------------------

    @torch.no_grad()
    def forward(  # type: ignore[override]  # transformers' two-sided models take a target beside the source
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: Sequences | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Output:
        """Of masked tokens zeros. With a `cache` of an earlier call the sources are those of that call."""
        refuse_states(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        target_ids = decoder_input_ids
        if target_ids is None or (input_ids is None and cache is None):
            raise Reject(no_target("a source and `decoder_input_ids` are what it computes logits of"))
        mask = (
            torch.ones_like(target_ids)
            if decoder_attention_mask is None
            else decoder_attention_mask[:, -target_ids.shape[1] :]
        )
        refuse_visible_padding(target_ids, mask, self.uncounted)
        logits = torch.zeros((*target_ids.shape, self.plan["vocabulary"]))
        if cache is not None:
            self._decode(logits, target_ids, mask, cache.numbers)
            return Output(logits=logits, cache=cache)
        assert input_ids is not None, "asked for above"
        sources = self.sources_of(input_ids, attention_mask)
        if use_cache:
            cache = Sequences(self, len(target_ids))
            self.encode(cache.numbers, sources)
            self._decode(logits, target_ids, mask, cache.numbers)
            return Output(logits=logits, cache=cache)
        for start in range(0, len(target_ids), max(1, self.spare)):
            part = slice(start, start + max(1, self.spare))
            with self.sequences_of(len(target_ids[part])) as numbers:
                self.encode(numbers, sources[part])
                self._decode(logits[part], target_ids[part], mask[part], numbers)
        return Output(logits=logits)

    def _decode(self, logits: Tensor, target_ids: Tensor, mask: Tensor, numbers: Sequence[int]) -> None:
        for row, number in enumerate(numbers):
            self._fill(logits[row], target_ids[row], mask[row], number)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        *,
        decoder_input_ids: Tensor | None = None,
        streamer: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        return_dict_in_generate: bool | None = None,
        output_logits: bool | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Any:
        """Targets [b, 1 + new] for sources [b, s], or an object as `NativeModel.generate` gives one.

        decoder_input_ids   what targets begin with; by default the model's first token
        settings            of a generation config: `max_new_tokens`, `forced_bos_token_id`, `no_repeat_ngram_size`
                            and so on, which the config of the call and then the model's own have otherwise
        """
        read = _Read(settings, generation_config, self.generation_config)
        prefix = self._start(read, len(input_ids)) if decoder_input_ids is None else decoder_input_ids
        sampling = _sampling(read, prefix.shape[1], seed)
        max_length = prefix.shape[1] + sampling.max_new_tokens
        rules = build_rules(read, prefix.shape[1], max_length, self.plan["vocabulary"])
        stops = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
        keep = bool(read("output_logits") if output_logits is None else output_logits)
        run = Generation(self, sampling, stops, tokenizer or self.tokenizer, streamer, keep, rules)
        sources = self.sources_of(input_ids, attention_mask)
        sequences, logits = run(prefix, torch.ones_like(prefix), lambda numbers: self.encode(numbers, sources))
        as_object = read("return_dict_in_generate") if return_dict_in_generate is None else return_dict_in_generate
        if not as_object:
            return sequences
        return Output(sequences=sequences, logits=logits) if keep else Output(sequences=sequences)

    def _start(self, read: "_Read", rows: int) -> Tensor:
        first = read("decoder_start_token_id")
        first = self.config.decoder_start_token_id if first is None else first
        if type(first) is not int or not 0 <= first < self.plan["vocabulary"]:
            raise Reject(bad_sampling(f"`decoder_start_token_id` is {first}, and targets begin with one token"))
        return torch.full((rows, 1), first)


class _Read:
    """A setting of generation: what the call says, else its config, else the model's own."""

    def __init__(self, settings: Mapping[str, Any], call_config: Any, model_config: SimpleNamespace):
        self.configs = (settings, call_config, vars(model_config))

    def __call__(self, name: str) -> Any:
        for config in self.configs:
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            if value is not None:
                return value
        return None


def rows_of(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row that a mask shows."""
    visible = torch.ones_like(ids) if mask is None else mask
    return [row[row_mask.bool()] for row, row_mask in zip(ids, visible, strict=True)]


def _sampling(read: _Read, prefix_length: int, seed: int | None) -> Sampling:
    """Lengths of targets count what they begin with, unless tokens that are new are counted."""
    names = ("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    lengths = {name: read(name) for name in names}
    if lengths["max_new_tokens"] is None and read("max_length") is not None:
        lengths["max_new_tokens"] = read("max_length") - prefix_length
    if lengths["min_new_tokens"] is None and read("min_length"):
        lengths["min_new_tokens"] = max(0, read("min_length") - prefix_length)
    eos, pad = as_tokens(read("eos_token_id")), read("pad_token_id")
    return Sampling().overlaid(**lengths, eos=eos, pad=pad, seed=seed).checked()
