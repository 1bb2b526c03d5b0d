"""Models of `effc serve` that answer by themselves: decoders with their adapters, and encoders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...driver.models import check_model_path
from .flags import SharedFlags
from .model_sources import ModelSource

if TYPE_CHECKING:
    from ...apps.serving.api import Service
    from ...apps.serving.embeddings import EmbeddingService
    from ...apps.serving.served_models import ServedModels
    from ...driver.models import NamedModel

_MAX_CACHE_BYTES = 512 << 20  # bytes of keys and values that are held for requests that go on with earlier ones


@dataclass(frozen=True)
class ModelOptions:
    """Settings of every model of a server.

    parallel   requests of a model that are answered at once
    queue      that may wait for it
    smaller    name of the model that answers requests of another under load, by that one's name
    collector  URL that takes spans of requests; None: there are none
    mapped     weights stay on disk; None: large ones
    """

    parallel: int = 16
    queue: int = 64
    mapped: bool | None = None
    speculation: bool = False
    smaller: Mapping[str, str] = field(default_factory=dict)
    collector: str | None = None


class ModelOpener:
    """Opens models of one server, which share threads, metrics and memory for earlier prompts."""

    def __init__(self, sources: Sequence[ModelSource], shared: SharedFlags, options: ModelOptions):
        from ...apps.serving.fair_lock import FairLock
        from ...apps.serving.metrics import Metrics, ModelMetrics

        self._sources, self._shared, self._options = {s.name: s for s in sources}, shared, options
        metrics = Metrics()
        self._metrics: dict[str, ModelMetrics] = {s.name: ModelMetrics(metrics, s.name) for s in sources}
        self._compute_lock: FairLock = FairLock()

    def open_all(self) -> "ServedModels":
        """All models, and spans of their requests where a collector is named."""
        from ...apps.serving.served_models import ServedModels

        services, options, tracing = list(map(self.open, self._sources)), self._options, None
        if options.collector is not None:
            from ...apps.serving.tracing import Tracing

            tracing = Tracing(options.collector, services[0].metrics.server)
        return ServedModels(*services, smaller=options.smaller, tracing=tracing)

    def open(self, name: str) -> "Service | EmbeddingService":
        """The model of a name, tried out, as its files are now."""
        from ...apps.serving.adapters import parse_adapter_options
        from ...apps.serving.api import Service
        from ...apps.serving.runner import CachedModel, make_decoder, try_out
        from ...apps.serving.scheduler import Scheduler
        from ...driver.models import model_errors_as_diagnostics, open_model
        from ...models.checkpoints.generation_config import eos_ids_tuple
        from ...runtimes.sequence_pool import tokens_in

        source, options = self._sources[name], self._options
        folders = parse_adapter_options(source.adapters)
        opened = open_model(
            source.location, self._shared.settings(), batch_invariant=True, mapped=options.mapped, needs_tokenizer=True
        )
        if not folders and is_headless_encoder(opened.model):
            return self._embedding_service(opened, name)
        runner = make_decoder(opened.model, opened.label, folders)
        with model_errors_as_diagnostics(opened.label), self._compute_lock:
            try_out(runner)
        known = (opened.model.generation_config.eos_token_id, opened.tokenizer.eos_token_id)
        eos_ids = next((eos_ids_tuple(eos) for eos in known if eos is not None), ())
        cache_bytes = _MAX_CACHE_BYTES // len(self._sources)
        decoding: dict[str, Any] = {"prefix_cache_tokens": tokens_in(cache_bytes, getattr(opened.model, "plan", {}))}
        if isinstance(runner, CachedModel):
            decoding = {}
        elif options.speculation:
            decoding["draft_tokens"] = opened.model.draft_tokens
        if folders:
            decoding["adapted"] = runner
        decoding |= {"metrics": self._metrics[name], "compute_lock": self._compute_lock}
        scheduler = Scheduler(runner, opened.tokenizer, eos_ids or (), options.queue, options.parallel, **decoding)
        return Service(name, scheduler, opened.tokenizer, runner.context, runner.vocabulary, list(folders))

    def reopen(self, name: str) -> "Service | EmbeddingService":
        """The model of a name once more, after every file of its artifacts was compared with its hash, and with its
        signature where those are required."""
        from ...apps.serving.adapters import parse_adapter_options
        from ...artifacts.load import verify_artifact_files, verify_signature_and_files

        source = self._sources[name]
        check_model_path(source.location)
        for folder in (Path(source.location), *parse_adapter_options(source.adapters).values()):
            if self._shared.signed_by:
                verify_signature_and_files(folder, self._shared.signed_by)
            else:
                verify_artifact_files(folder)
        return self.open(name)

    def _embedding_service(self, opened: "NamedModel", name: str) -> "EmbeddingService":
        from ...apps.serving.embeddings import EmbeddingService
        from ...driver.models import model_errors_as_diagnostics
        from ...models.checkpoints.origin import max_row_tokens
        from ...models.rows.encoder_states import resolve_pooling_name
        from ...models.rows.inputs import vocabulary_size

        length = max_row_tokens(opened.model.config.to_dict()) or 512
        vocabulary = vocabulary_size(opened.model) or len(opened.tokenizer)
        pooling, encoder = resolve_pooling_name(opened.folder, "auto"), opened.model.eval()
        with model_errors_as_diagnostics(opened.label):
            service = EmbeddingService(
                name, encoder, opened.tokenizer, pooling, length, vocabulary, self._metrics[name], self._compute_lock
            )
            service.try_out()
        return service


def is_headless_encoder(model: Any) -> bool:
    """Whether a model gives hidden states of its whole input, and has no head behind them."""
    from ...models.checkpoints.pretrained import is_pretrained, pretrained
    from ...runtimes.native.encoder import NativeEncoder

    if isinstance(model, NativeEncoder):
        return model.states
    if not is_pretrained(model) or getattr(model.config, "is_encoder_decoder", False):
        return False
    # Llama 4's text part and Mllama's have a head and no base model of their own: both are asked for.
    headless = model.base_model is model and pretrained(model).get_output_embeddings() is None
    return headless and not model.can_generate() and model.main_input_name == "input_ids"
