"""Services of `effc serve`: a model, a client of test-time compute, a knowledge base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import SharedFlags

if TYPE_CHECKING:
    from ...driver.models import NamedModel

_MAX_CACHE_BYTES = 512 << 20  # bytes of keys and values that are held for requests that go on with earlier ones


@dataclass(frozen=True)
class Service:
    """`count` hears the path, the status and the seconds of an answer; `stop` cancels all."""

    name: str
    app: Any
    count: Callable[[str, int, float], None]
    stop: Callable[[], None]


def model_service(
    location: str,
    name: str,
    shared: SharedFlags,
    parallel: int,
    queue: int,
    adapters: Sequence[str] = (),
    mapped: bool | None = None,
    speculation: bool = False,
) -> Service:
    from ...apps.serving.adapters import copies_with_adapters, parse_adapter_options
    from ...apps.serving.api import Service as Model
    from ...apps.serving.api import make_openai_application
    from ...apps.serving.runner import CachedModel, make_decoder, try_out
    from ...apps.serving.scheduler import Scheduler
    from ...driver.models import model_errors_as_diagnostics, open_model
    from ...models.checkpoints.generation_config import as_tokens
    from ...runtimes.sequence_pool import tokens_in

    folders = parse_adapter_options(adapters)
    opened = open_model(location, shared.settings(), steady=True, mapped=mapped, needs_tokenizer=True)
    if not folders and encodes(opened.model):
        return _embedding_service(opened, name)
    adapters_by_name = copies_with_adapters(opened.model, opened.label, folders)
    runner = make_decoder(opened.model, opened.label, adapters_by_name)
    with model_errors_as_diagnostics(opened.label):
        try_out(runner)
    known = (opened.model.generation_config.eos_token_id, opened.tokenizer.eos_token_id)
    eos_ids = next((as_tokens(eos) for eos in known if eos is not None), ())
    options: dict[str, Any] = {"remembers": tokens_in(_MAX_CACHE_BYTES, getattr(opened.model, "plan", {}))}
    if isinstance(runner, CachedModel):
        options = {"choose": runner.set_sequence_adapter}
    elif speculation:
        options["draft_tokens"] = opened.model.draft_tokens
    scheduler = Scheduler(runner, opened.tokenizer, eos_ids or (), queue, parallel, **options)
    service = Model(name, scheduler, opened.tokenizer, runner.context, runner.vocabulary, list(adapters_by_name))
    return Service(name, make_openai_application(service), scheduler.metrics.add_answer, scheduler.stop)


def encodes(model: Any) -> bool:
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


def _embedding_service(opened: "NamedModel", name: str) -> Service:
    from ...apps.serving.embeddings import EmbeddingService, make_embedding_application
    from ...driver.models import model_errors_as_diagnostics
    from ...models.checkpoints.origin import max_row_tokens
    from ...models.rows.encoder_states import resolve_pooling_name
    from ...models.rows.inputs import vocabulary_size

    length = max_row_tokens(opened.model.config.to_dict()) or 512
    vocabulary = vocabulary_size(opened.model) or len(opened.tokenizer)
    pooling = resolve_pooling_name(opened.folder, "auto")
    with model_errors_as_diagnostics(opened.label):
        service = EmbeddingService(name, opened.model.eval(), opened.tokenizer, pooling, length, vocabulary)
        service.try_out()
    return Service(name, make_embedding_application(service), service.metrics.add_answer, lambda: None)


def guided_service(
    location: str, name: str, shared: SharedFlags, queue: int, knowledge: str | None, speculation: bool = False
) -> Service:
    from ...apps.rttc.chat_server import GuidedServer, make_chat_application
    from ...apps.rttc.guided_opening import open_guided_model
    from ...driver.models import model_errors_as_diagnostics

    with model_errors_as_diagnostics(location):
        front = GuidedServer(name, open_guided_model(location, shared.settings(), knowledge, speculation), queue)
    return Service(
        name,
        make_chat_application(front),
        lambda path, status, _: front.answers.labels(path, str(status)).inc(),
        front.stop,
    )


def knowledge_service(location: str, name: str, shared: SharedFlags, engine: str) -> Service:
    """The base of a folder, searched by an engine. No model is loaded but a judge or scorer that needs none of the
    client's."""
    from ...apps.rttc.app import EMBEDDER, KNOWLEDGE, REWARD, open_encoder_reward, read_app
    from ...apps.rttc.app_folder import NAME
    from ...apps.rttc.embedder import open_folder_embedder
    from ...apps.rttc.knowledge import open_knowledge_base
    from ...apps.rttc.knowledge_server import KnowledgeService, make_knowledge_application
    from ...apps.rttc.reward import Judge
    from ...artifacts.manifest import read_manifest, verify_files

    folder, app = Path(location), read_app(Path(location))
    manifest = read_manifest(folder)
    for part in (NAME, KNOWLEDGE, EMBEDDER, REWARD):
        verify_files(folder, manifest, prefix=part)
    reward: Any = None
    if app.reward == "judge":
        reward = Judge(folder / REWARD)
    elif app.reward == "scorer" and app.embed == "folder":
        reward = open_encoder_reward(folder, open_folder_embedder(folder / EMBEDDER, shared.cache_folder))
    library = KnowledgeService(open_knowledge_base(folder / KNOWLEDGE).searched_by(engine), app.selection, reward)
    return Service(
        name,
        make_knowledge_application(library),
        lambda path, status, _: library.answers.labels(path, str(status)).inc(),
        lambda: None,
    )
