"""Several folders of interventions on one base, for requests that name one: `BASE:NAME`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....dsl.syntax.diagnostics import Fault

if TYPE_CHECKING:
    from .chat import ChatSession, Reply

no_adapter = Fault(
    "no-adapter",
    "An adapter was named that can't be put onto the model that is served.\n\n"
    "`--adapter NAME=FOLDER` takes artifacts of the target `reft`, or their `reft/` folders, that were trained in this "
    "very model; the model is one that torch runs. Requests name it as `MODEL:NAME`.",
    exit="usage",
)


def parse_adapter_options(name_folder_pairs: Sequence[str]) -> dict[str, Path]:
    """Folders of interventions by name, out of `NAME=FOLDER`. Raises Reject (no-adapter)."""
    from ...artifacts.reft import FILE, FOLDER

    folders: dict[str, Path] = {}
    for text in name_folder_pairs:
        name, equals, path_text = text.partition("=")
        if not equals or not name or not path_text or any(mark in name for mark in ":/ ") or not name.isprintable():
            raise no_adapter(f"`--adapter {text}` names no adapter", help="write --adapter NAME=FOLDER").rejection()
        if name in folders:
            raise no_adapter(f"two adapters are called `{name}`", help="give either a name of its own").rejection()
        folder = Path(path_text)
        inner = next((f for f in (folder / FOLDER, folder) if (f / FILE).is_file()), None)
        if inner is None:
            raise no_adapter(
                f"{path_text} holds no interventions", help="name an artifact that the target `reft` wrote"
            ).rejection()
        folders[name] = inner
    return folders


def copies_with_adapters(model: Any, label: str, folders: Mapping[str, Path]) -> dict[str, Any]:
    """The model once more for every folder, with its interventions on: other modules over the same tensors.

    Raises Reject where the model is none of torch, or another than an adapter was trained in.
    """
    from ...artifacts.reft import attach_interventions, base_hash, other_base, read_reft_folder
    from ...runtimes.model import DecoderModel

    if not folders:
        return {}
    if isinstance(model, DecoderModel):
        raise no_adapter(
            f"{label} runs on the native engine, which has no step for interventions",
            help="serve the model as `hf` wrote it, or its own folder",
        ).rejection()
    base_sha, result = base_hash(model), {}
    for name, folder in folders.items():
        _check_files(folder)
        base, _ = read_reft_folder(folder)
        if base["sha256"] != base_sha:
            raise other_base(
                f"{folder} belongs to {base['place'] or 'the model beside it'}, and {label} has other tensors",
                help="serve the model that it was trained in",
            ).rejection()
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        result[name] = copy.deepcopy(model, shared)
        attach_interventions(result[name], folder, check_base=False)
        result[name].eval()
    return result


def _check_files(folder: Path) -> None:
    """Compare with the manifest, where the folder is an artifact's."""
    from ...artifacts.manifest import NAME, read_manifest, verify_files

    if (folder.parent / NAME).is_file():
        verify_files(folder.parent, read_manifest(folder.parent), prefix=folder.name)


class AdapterChats:
    """Talkers by their adapter, "" for the plain model, one of whom answers until a prompt begins with another's name.

    A single adapter answers from the start. Raises Reject (no-adapter) for a name that is none.
    """

    def __init__(self, chat_sessions: "Mapping[str, ChatSession]"):
        self.chat_sessions = chat_sessions
        self.name = list(chat_sessions)[-1] if len(chat_sessions) == 2 else ""

    @property
    def chats(self) -> bool:
        return self.chat_sessions[""].chats

    def answer(self, prompt: str, on_text: Callable[[str], None]) -> "Reply":
        if prompt.startswith(":"):
            name, _, prompt = prompt[1:].partition(" ")
            if name not in self.chat_sessions:
                known = ", ".join(f"`:{one}`" for one in self.chat_sessions)
                raise no_adapter(f"there is no adapter `{name:.40}`", help=f"there are {known}").rejection()
            self.name = name
        return self.chat_sessions[self.name].answer(prompt, on_text)
