"""Client of test-time compute, opened from its folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ....dsl.syntax.diagnostics import Fault

if TYPE_CHECKING:
    from ...core.settings import Settings
    from .guided import GuidedModel
    from .retrieval import RemoteRetriever

no_such_role = Fault(
    "no-such-role",
    "A folder was to be served in a role that it can't have.\n\n"
    "Folders of the target `rttc` have two: `client` answers, `server` gives samples to clients.",
    exit="usage",
)


def open_guided_model(
    location: str, settings: "Settings", knowledge_url: str | None, speculation: bool = False
) -> "GuidedModel":
    """The client of a folder; its model, base and rewards are compared with the manifest first.

    speculation   the native engine verifies drafts of a prompt's n-grams
    """
    from ...artifacts.manifest import read_manifest, verify_files
    from ...driver.models import open_model
    from .app import open_guided_client, read_app

    folder, app = Path(location), read_app(Path(location))
    opened = open_model(location, settings, needs_tokenizer=True)
    verify_files(folder, read_manifest(folder))
    client = open_guided_client(
        app, folder, opened.model, opened.tokenizer, settings.cache_dir, remote_knowledge(knowledge_url)
    )
    if client.generator is not None and not speculation:
        client.generator.disable_speculation()
    return client


def remote_knowledge(url: str | None) -> "RemoteRetriever | None":
    """A server of samples; EFFC_KNOWLEDGE_KEY is the key that it asks for."""
    from .retrieval import RemoteRetriever

    if url is None:
        return None
    if not url.startswith(("http://", "https://")):
        raise no_such_role(f"`{url}` is no address of a server", help="write http://HOST:PORT").rejection()
    return RemoteRetriever(url, os.environ.get("EFFC_KNOWLEDGE_KEY", ""))
