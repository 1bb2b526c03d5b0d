"""One editor's language server: what it has open, and when it is told what."""

import asyncio
import logging
from importlib.metadata import version
from typing import Any, BinaryIO

from lsprotocol import types as lsp
from pygls.exceptions import JsonRpcException, JsonRpcInvalidParams
from pygls.lsp.server import LanguageServer
from pygls.protocol import LanguageServerProtocol

from ....dsl.syntax.diagnostics import Fault, Reject
from ...core.quantity import size_text
from .diagnostics import document_diagnostics
from .hints import Forecasts
from .open_documents import OpenDocuments, Reading, path_of

MAX_MESSAGE_BYTES = (
    64 << 20
)  # bytes of a message: no recipe is near that, and memory is reserved as soon as a message is announced
long_message = Fault(
    "long-message", "An editor announced a message larger than any that the language server reads.", exit="usage"
)
PAUSE = 0.02  # seconds in which another change makes this one's diagnostics void


class Protocol(LanguageServerProtocol):
    """The protocol's messages; a request that is none is answered, too."""

    def structure_message(self, data: dict[str, Any]) -> Any:
        try:
            return super().structure_message(data)
        except JsonRpcException as error:
            if "id" in data and "method" in data:
                self._send_response(data["id"], None, error.to_response_error())
            raise


class Input:
    """Input from an editor, line by line and message by message. Raises Reject (long-message)."""

    def __init__(self, stream: BinaryIO) -> None:
        self.readline, self.close, self.stream = stream.readline, stream.close, stream

    def read(self, count: int) -> bytes:
        if count > MAX_MESSAGE_BYTES:
            most = size_text(MAX_MESSAGE_BYTES)
            message = f"a message of {size_text(count)} was announced, the most that is read is {most}"
            raise long_message(message, help="start `effc lsp` from an editor (docs/editor.md)").rejection()
        return self.stream.read(count)


class Server(LanguageServer):
    """`options` come with `initialize`:

    plan       sound recipes are planned in a process of their own, and hints tell what steps do
    defaults   hints tell the parameters that calls leave out
    """

    def __init__(self) -> None:
        full_sync = lsp.TextDocumentSyncKind.Full
        super().__init__("effc", version("effc"), text_document_sync_kind=full_sync, protocol_cls=Protocol)
        # It prints a page of each malformed message: an editor that reads none would stop us with a full pipe.
        logging.getLogger("pygls").setLevel(logging.CRITICAL)
        self.documents = OpenDocuments()
        self.forecasts = Forecasts(self.planned)
        self.options: dict[str, Any] = {"plan": True, "defaults": False}
        self.loop: asyncio.AbstractEventLoop | None = None

    def begin(self, initialization_options: Any) -> None:
        """Take an editor's wishes; the first recipe that is read makes the words known, so that no person waits."""
        self.loop = asyncio.get_running_loop()
        self.documents.models.notify = self.looked
        if isinstance(initialization_options, dict):
            self.options |= {
                name: initialization_options[name]
                for name in self.options
                if isinstance(initialization_options.get(name), bool)
            }
        warm = path_of("untitled:effc-warm")
        self.documents.open_and_check(
            warm, 'effspec 1\nmodel m = zoo("tiny-llama")\npipeline p(m) { x = clean.dead() }\n'
        )
        self.documents.close(warm)

    def looked(self) -> None:
        """A model's structure is known; called from another thread."""
        if self.loop:
            self.loop.call_soon_threadsafe(self.read_all)

    def planned(self) -> None:
        """Ask the editor to ask for hints again, where it can; called from another thread."""
        workspace = self.client_capabilities.workspace
        if self.loop and workspace and workspace.inlay_hint and workspace.inlay_hint.refresh_support:
            self.loop.call_soon_threadsafe(self.workspace_inlay_hint_refresh, None)

    def take(self, uri: str) -> None:
        """The text of a document as the editor has it now."""
        path = path_of(uri)
        self.documents.texts[path] = self.workspace.get_text_document(uri).source
        self.documents.stale.add(path)

    def reading(self, uri: str) -> Reading:
        """The checked reading of an open document, or of a file as it lies on disk."""
        path = path_of(uri)
        if path in self.documents.texts:
            return self.documents.current_reading(path)
        try:
            return self.documents.check_closed_file(path)
        except Reject as rejection:
            raise JsonRpcInvalidParams("; ".join(d.message for d in rejection.diagnostics)) from None

    def publish(self, uri: str) -> None:
        """Publish what is wrong, and plan what is sound."""
        reading, document = self.reading(uri), self.workspace.get_text_document(uri)
        self.text_document_publish_diagnostics(
            lsp.PublishDiagnosticsParams(uri, document_diagnostics(reading), document.version)
        )
        if self.options["plan"]:
            self.forecasts.request_forecast(reading, self.documents)

    async def publish_soon(self, uri: str, version: int | None) -> None:
        """The same, unless the document changes again at once."""
        await asyncio.sleep(PAUSE)
        if path_of(uri) in self.documents.texts and self.workspace.get_text_document(uri).version == version:
            self.publish(uri)

    def publish_all(self) -> None:
        """Files have changed: whatever is open is read again."""
        self.documents.forget_models()
        self.read_all()

    def read_all(self) -> None:
        for document in list(self.workspace.text_documents.values()):  # its keys may be spelled otherwise
            self.take(document.uri)
            self.publish(document.uri)
