"""An encoder with a decoder by an engine: it reads a source, and says a target."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateEncoderDecoderOutput

from ...dsl.syntax.diagnostics import Fault
from .cache import SequenceCache
from .decoder import SourceDecoder
from .generation import Generation, invalid_sampling
from .inputs import IGNORED, check_mask, check_token_id_tensor, classification_loss
from .model import DecoderModel, Output, check_token_ids_in_vocabulary, context_full
from .position_offsets import refuse_visible_padding

no_target = Fault("no-target", "An encoder with a decoder is called without what its decoder has said.", exit="usage")


class Seq2SeqModel(DecoderModel):
    """`logits` [b, t, vocabulary] of targets [b, t] behind sources [b, s], and `generate`, which says targets.

    Sources may be filled up on either side, under their mask: positions are those of a source's own tokens. What the
    encoder makes of one is computed once, and kept for every token that is said of it.
    """

    engine: SourceDecoder
    _generated = GenerateEncoderDecoderOutput

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "prefix_tokens": 0})  # targets that begin alike have other sources
        start, pad = self.facts["start"], self.facts.get("pad")
        self.config.is_encoder_decoder, self.config.decoder_start_token_id = True, start
        self.config.pad_token_id = pad if type(pad) is int else None
        self.config.max_position_embeddings = self.engine.sources
        if self.generation_config.decoder_start_token_id is None:
            self.generation_config.decoder_start_token_id = start

    # -- sources ---------------------------------------------------------------------------------------------

    def unbind_sources(self, sources: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Each source of a batch alone."""
        if not sources.is_floating_point():  # of tokens, not of sounds
            refuse_visible_padding(sources, mask, self.uncounted)
        return unmasked_rows(sources, mask)

    def encode(self, sequences: Sequence[int], sources: Sequence[Tensor]) -> None:
        """Read sources, each into an open sequence that has none yet."""
        longest = max(len(ids) for ids in sources)
        if longest > self.engine.sources:
            raise context_full(
                f"a source of {longest} tokens is longer than the {self.engine.sources} that the encoder reads",
                help="give it a part of the text at a time",
            ).rejection()
        if not min(len(ids) for ids in sources):
            raise invalid_sampling("a source has no token", help="end it with the tokenizer's last token").rejection()
        ids = torch.cat(list(sources))
        check_token_ids_in_vocabulary(ids, self.engine.source_vocabulary)
        with self.exclusive():
            owners = [sequence for sequence, ids in zip(sequences, sources, strict=True) for _ in range(len(ids))]
            self.engine.encode(ids.tolist(), owners)

    def _read(self, sequences: Sequence[int], encoder_outputs: Mapping[str, Any]) -> None:
        """Read the sources that `generate` hands on, each into an open sequence."""
        if "sources" not in encoder_outputs:
            problem = "the engine keeps what its encoder makes of a source, and takes none from elsewhere"
            raise no_target(problem, help="hand it the source in place of `encoder_outputs`").rejection()
        self.encode(sequences, self.unbind_sources(encoder_outputs["sources"], encoder_outputs["attention_mask"]))

    # -- what transformers' models have ----------------------------------------------------------------------

    @torch.no_grad()
    def forward(  # type: ignore[override]  # transformers' two-sided models take a target beside the source
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: SequenceCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """Logits of target tokens for sources; zeros for masked tokens. With a `cache` of an earlier call the sources
        are those of that call.

        encoder_outputs   sources that `generate` hands on from step to step, or what an earlier call gave
        labels            [b, t] targets, -100 where none counts: `loss` is then theirs, and without
                          `decoder_input_ids` the decoder reads them behind its first token
        """
        self.refuse_states(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        if labels is not None:
            sources = {"encoder_outputs": encoder_outputs, "cache": cache, "use_cache": use_cache}
            targets = self._behind_start(labels) if decoder_input_ids is None else decoder_input_ids
            output = Seq2SeqModel.forward(self, input_ids, attention_mask, targets, decoder_attention_mask, **sources)
            return Output({"loss": classification_loss(output.logits, labels, torch.ones_like(targets)), **output})
        if input_ids is not None:
            self.check_inputs(input_ids, attention_mask)
        ids = decoder_input_ids
        if ids is None or (input_ids is None and encoder_outputs is None and (cache is None or not cache.sequences)):
            raise no_target("a source and `decoder_input_ids` are what it computes logits of").rejection()
        check_token_id_tensor(ids, "decoder_input_ids")
        before = 0 if cache is None else cache.get_seq_length()
        check_mask(decoder_attention_mask, ids, before, "decoder_attention_mask")
        mask = torch.ones_like(ids) if decoder_attention_mask is None else decoder_attention_mask[:, -ids.shape[1] :]
        refuse_visible_padding(ids, mask, self.uncounted)
        if encoder_outputs is None:
            encoder_outputs = Output(sources=input_ids, attention_mask=attention_mask)
        if use_cache or cache is not None:
            cache = SequenceCache(self) if cache is None else cache
            if cache.open_if_closed(len(ids)):
                self._read(cache.sequences, encoder_outputs)
            logits = self._last_logits(cache.sequences, ids, mask, ids.shape[1])
            cache.append_visible_tokens(ids, mask)
            return Output(logits=logits, cache=cache)
        logits, step = torch.zeros((*ids.shape, self.plan["vocabulary"])), max(1, self.num_free_sequences)
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            with self.temporary_sequences(len(ids[part])) as numbers:
                self._read(numbers, {n: None if x is None else x[part] for n, x in encoder_outputs.items()})
                logits[part] = self._last_logits(numbers, ids[part], mask[part], ids.shape[1])
        return Output(logits=logits)

    def _behind_start(self, labels: Tensor) -> Tensor:
        """Ids [b, t] that a decoder reads to say labels: its first token, then all labels but the last."""
        check_token_id_tensor(labels, "labels")
        pad = self.config.pad_token_id or 0
        start = labels.new_full((len(labels), 1), self.facts["start"])
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad)], 1)

    def _run_generation(self, run: Generation, input_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        mask = kwargs.get("decoder_attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        return run(input_ids, mask, lambda numbers: self._read(numbers, kwargs["encoder_outputs"]))

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], *_: Any
    ) -> dict[str, Any]:
        """Hand sources on: they are read once the engine has sequences for them."""
        if model_kwargs.get("encoder_outputs") is None:
            sources = {"sources": inputs_tensor, "attention_mask": model_kwargs.get("attention_mask")}
            model_kwargs["encoder_outputs"] = Output(sources)
        return model_kwargs


def unmasked_rows(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row that a mask shows."""
    visible = torch.ones_like(ids) if mask is None else mask
    return [row[row_mask.bool()] for row, row_mask in zip(ids, visible, strict=True)]
