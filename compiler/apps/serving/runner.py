"""Model runner of a server: several sequences at once, and tokens of all of them in one call."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault
from ...runtimes.decoder import Decoder
from .adapters import adapted_engine, model_copies_with_adapters

unserved_model = Fault(
    "unserved-model",
    "A model was asked to be served that can't answer.\n\n"
    "Causal language models that attend to a cache are served: artifacts of the targets `native` and `hf`, "
    "and model folders. Models with state-space layers are served as artifacts of `native`: with transformers some "
    "compute wrong logits when a prompt comes in pieces.",
    exit="usage",
)

MAX_SEQUENCES = 16
_PIECE = 128  # tokens of one forward: a prompt is cut at multiples of it, whatever else runs


class CachedModel:
    """A model of transformers as a runner: one forward per sequence, each with its cache.

    Sequences never share a forward, so that answers do not depend on what else runs.

    adapters    the same model with interventions on it, by name: modules of their own over the same weights, so that
                nothing is switched in what another sequence runs on
    """

    backward = False  # whole sequences are forgotten

    def __init__(self, model: Any, max_sequences: int = MAX_SEQUENCES, adapters: Mapping[str, Any] | None = None):
        from ...ir.layers.reft import interventions

        config = model.config.get_text_config(decoder=True)
        self._models = {"": model, **(adapters or {})}
        self._edited = {name: any(True for _ in interventions(model_of)) for name, model_of in self._models.items()}
        self._chosen: dict[int, str] = {}  # what sequences run on, where that is not the model itself
        self._caches: dict[int, Any] = {}
        self._lengths = [0] * max_sequences
        self.max_sequences = max_sequences
        self.context = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.vocabulary = config.vocab_size

    def needs_full_prompt(self, adapter: str) -> bool:
        return self._edited[adapter]

    def set_sequence_adapter(self, sequence: int, adapter: str) -> None:
        self._chosen[sequence] = adapter

    @torch.inference_mode()
    def run(self, ids: Sequence[int], sequences: Sequence[int], outputs: Sequence[int]) -> Tensor:
        logits_rows, outputs_set, start = [], set(outputs), 0
        while start < len(ids):
            end = start + 1
            piece = _PIECE - self._lengths[sequences[start]] % _PIECE
            if self._edited[self._chosen.get(sequences[start], "")]:
                piece = len(ids)
            while end < len(ids) and sequences[end] == sequences[start] and end - start < piece:
                end += 1
            logits = self._forward_with_cache(sequences[start], ids[start:end])
            logits_rows += [logits[i - start].float().cpu() for i in range(start, end) if i in outputs_set]
            start = end
        return torch.stack(logits_rows) if logits_rows else torch.empty(0, self.vocabulary)

    def _forward_with_cache(self, sequence: int, ids: Sequence[int]) -> Tensor:
        from transformers.cache_utils import DynamicCache

        if sequence not in self._caches:
            self._caches[sequence] = DynamicCache(config=self._models[""].config)
        model = self._models[self._chosen.get(sequence, "")]
        row = torch.tensor([list(ids)], device=model.device)
        output = model(input_ids=row, cache=self._caches[sequence], use_cache=True)
        self._lengths[sequence] += len(ids)
        return output.logits[0]

    def forget(self, sequence: int, length: int = 0) -> None:
        assert length == 0, "a sequence is forgotten whole"
        self._caches.pop(sequence, None)
        self._chosen.pop(sequence, None)
        self._lengths[sequence] = 0

    def length(self, sequence: int) -> int:
        return self._lengths[sequence]

    def cancel(self) -> None:
        """A forward goes on to its end: torch has no way to break it off."""


def try_out(runner: Decoder) -> None:
    """One token, before anybody asks: a model that can't be computed is found out while somebody looks."""
    logits = runner.run([0], [0], [0])
    runner.forget(0)
    if tuple(logits.shape) != (1, runner.vocabulary):
        raise ValueError(f"logits of {tuple(logits.shape)} for {runner.vocabulary} tokens")


def make_decoder(model: Any, label: str, adapters: Mapping[str, Path] | None = None) -> Decoder:
    """The native engine of an artifact that has one, else the model; Reject where that can't be served.

    adapters    folders by their names: with any, it is an `AdaptedDecoder`
    """
    from ...ir.layers.leaves import is_state_space
    from ...runtimes.model import DecoderModel
    from ...runtimes.seq2seq import Seq2SeqModel

    if isinstance(model, Seq2SeqModel):
        raise unserved_model(
            f"{label} reads a source and answers with a target, and the server continues texts",
            help='say it with `effc run`, or from Python with `effc.load("...").generate(...)`',
        ).rejection()
    if isinstance(model, DecoderModel) and model.can_generate():
        return adapted_engine(model, label, adapters) if adapters else model.engine
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or getattr(model.config, "is_encoder_decoder", False):
        kind = type(model).__name__
        raise unserved_model(
            f"{label} is no causal language model: {kind} answers no prompt",
            help="serve one that generates text; from Python, `effc.load` gives what this one computes",
        ).rejection()
    if is_state_space(model) or "cache" not in signature(model.forward).parameters:
        raise unserved_model(
            f"{label} keeps a state, and such models may misread a prompt in pieces",
            help="emit it as `native` and serve that; `effc run` talks to it as it is",
        ).rejection()
    return CachedModel(model, adapters=model_copies_with_adapters(model, label, adapters or {}))
