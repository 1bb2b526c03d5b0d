"""Services of `effc serve`: models, a client of test-time compute, a knowledge base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import SharedFlags
from .model_services import ModelOpener, ModelOptions
from .model_sources import ModelSource

if TYPE_CHECKING:
    from ...apps.serving.access_log import AccessLog
    from ...apps.serving.reload import Reloader


@dataclass(frozen=True)
class Service:
    """`count` hears the path, the status and the seconds of an answer; `stop` cancels all; `reloader` is what
    opens its models again, with the log that hears of it."""

    names: Sequence[str]
    app: Any
    count: Callable[[str, int, float], None]
    stop: Callable[[], None]
    reloader: "Callable[[AccessLog], Reloader] | None" = None


def model_service(sources: Sequence[ModelSource], shared: SharedFlags, options: ModelOptions) -> Service:
    from ...apps.serving.application import make_openai_application
    from ...apps.serving.reload import Reloader

    opener = ModelOpener(sources, shared, options)
    served = opener.open_all()
    return Service(
        [source.name for source in sources],
        make_openai_application(served),
        served.metrics.count_response,
        served.stop,
        lambda log: Reloader(served, opener.reopen, log),
    )


def guided_service(
    location: str, name: str, shared: SharedFlags, queue: int, knowledge: str | None, speculation: bool = False
) -> Service:
    from ...apps.rttc.chat_server import GuidedServer, make_chat_application
    from ...apps.rttc.guided_opening import open_guided_model
    from ...driver.models import model_errors_as_diagnostics

    with model_errors_as_diagnostics(location):
        front = GuidedServer(name, open_guided_model(location, shared.settings(), knowledge, speculation), queue)
    return Service(
        [name],
        make_chat_application(front),
        lambda path, status, _: front.answers.labels(path, str(status)).inc(),
        front.stop,
    )


def knowledge_search_service(location: str, name: str, shared: SharedFlags, search_engine: str) -> Service:
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
        verify_files(folder, manifest, name_prefix=part)
    reward: Any = None
    if app.reward == "judge":
        reward = Judge(folder / REWARD)
    elif app.reward == "scorer" and app.embed == "folder":
        reward = open_encoder_reward(folder, open_folder_embedder(folder / EMBEDDER, shared.cache_folder))
    library = KnowledgeService(
        open_knowledge_base(folder / KNOWLEDGE).with_search_engine(search_engine), app.selection, reward
    )
    return Service(
        [name],
        make_knowledge_application(library),
        lambda path, status, _: library.answers.labels(path, str(status)).inc(),
        lambda: None,
    )
