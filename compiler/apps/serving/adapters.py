"""Several adapters on one base, interventions and LoRA, for requests that name one: `BASE:NAME`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....dsl.syntax.diagnostics import Fault

if TYPE_CHECKING:
    from ....kernels.engine import Engine
    from ...runtimes.model import DecoderModel
    from ...runtimes.native.adapters import AdaptedEngine, EngineAdapter
    from .chat import ChatSession, Reply

no_adapter = Fault(
    "no-adapter",
    "An adapter was named that can't be put onto the model that is served.\n\n"
    "`--adapter NAME=FOLDER` takes artifacts of the target `reft` that were trained in this very model, and LoRA that "
    "peft or the target `peft` wrote; `--adapter '*=FOLDER'` takes all in FOLDER, by the names of their folders. The "
    "model is one that torch or the native engine runs. Requests name an adapter as `MODEL:NAME`.",
    exit="usage",
)
ALL = "*"  # name of whatever lies in a folder


def parse_adapter_options(name_folder_pairs: Sequence[str]) -> dict[str, Path]:
    """Folders of adapters by name, out of `NAME=FOLDER` and `*=FOLDER`. Raises Reject (no-adapter)."""
    folders: dict[str, Path] = {}
    for text in name_folder_pairs:
        name, equals, path_text = text.partition("=")
        if not equals or not path_text or not (name == ALL or _is_adapter_name(name)):
            raise no_adapter(f"`--adapter {text}` names no adapter", help="write --adapter NAME=FOLDER").rejection()
        for each, folder in folder_by_adapter_of_option(text).items():
            if each in folders:
                raise no_adapter(f"two adapters are called `{each}`", help="give either a name of its own").rejection()
            folders[each] = _weights_folder(folder)
    return folders


def _is_adapter_name(name: str) -> bool:
    return bool(name) and name.isprintable() and not any(mark in name for mark in ":/ ")


def folder_by_adapter_of_option(option: str) -> dict[str, Path]:
    """Folders that `NAME=FOLDER` or `*=FOLDER` names, with or without `MODEL:`. Raises Reject (no-adapter)."""
    name, _, location = option.partition("=")
    folder = Path(location)
    if name.rpartition(":")[2] != ALL:
        return {name: folder}
    try:
        entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise no_adapter(f"{folder} is no folder of adapters: {reason}").rejection() from error
    for entry in entries:
        if not _is_adapter_name(entry.name):
            help = "rename it: `:`, `/` and spaces are in no name"
            raise no_adapter(f"{str(entry)!a} has no name for an adapter", help=help).rejection()
    return {entry.name: entry for entry in entries}


def _weights_folder(folder: Path) -> Path:
    """The folder itself, or the one of an artifact, where an adapter's files are."""
    from ...artifacts.adapter import CONFIG
    from ...artifacts.reft import FILE, FOLDER

    candidates = ((folder / FOLDER, FILE), (folder, FILE), (folder / "adapter", CONFIG), (folder, CONFIG))
    inner = next((inside for inside, file in candidates if (inside / file).is_file()), None)
    if inner is None:
        raise no_adapter(
            f"{folder} holds no interventions and no LoRA",
            help="name an artifact of the targets `reft` or `peft`, or a folder that peft wrote",
        ).rejection()
    return inner


def model_copies_with_adapters(model: Any, label: str, folders: Mapping[str, Path]) -> dict[str, Any]:
    """The model once more for every folder, with its adapter on: other modules over the same tensors.

    Raises Reject where the model is another than an adapter was trained in.
    """
    from ...artifacts.reft import FILE
    from ...ir.weights import model_weights_hash
    from ...runtimes.model import DecoderModel
    from ...runtimes.native.adapters import model_with_adapter

    if not folders:
        return {}
    if isinstance(model, DecoderModel):
        adapters = engine_adapters(model, label, folders)
        return {name: model_with_adapter(model, name, adapter) for name, adapter in adapters.items()}
    base_sha = cache(partial(model_weights_hash, model))
    copies = {}
    for name, folder in folders.items():
        _check_manifest_hashes(folder)
        is_lora = not (folder / FILE).is_file()
        if not is_lora:
            _refuse_other_base(folder, label, base_sha())
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        copied = copy.deepcopy(model, shared)
        copies[name] = _with_lora(copied, folder) if is_lora else _with_interventions(copied, folder)
    return copies


def adapted_engine(model: "DecoderModel", label: str, folders: Mapping[str, Path]) -> "AdaptedEngine":
    """The native engine of a model, whose sequences may have the adapters of folders. Raises Reject."""
    from ...runtimes.native.adapters import AdaptedEngine

    return AdaptedEngine(_native_engine(model, label), engine_adapters(model, label, folders))


def _native_engine(model: "DecoderModel", label: str) -> "Engine":
    from ....kernels.engine import Engine

    if not isinstance(model.engine, Engine):
        raise no_adapter(
            f"{label} runs on {model.engine_name}, which has no step for adapters",
            help="serve it as `native` or `hf` wrote it, or its own folder",
        ).rejection()
    if model.engine.sources:
        raise no_adapter(f"{label} reads a source, and adapters are for models that continue texts").rejection()
    return model.engine


def engine_adapters(model: "DecoderModel", label: str, folders: Mapping[str, Path]) -> "dict[str, EngineAdapter]":
    """Adapters of folders, put onto the native engine of a model. Raises Reject where one doesn't fit it."""
    from ....kernels.native import KernelError
    from ...artifacts.adapter import read_lora_factors
    from ...artifacts.reft import FILE
    from ...runtimes.native.adapters import EngineAdapter, Factors, low_rank_updates_of_linears

    engine, adapters = _native_engine(model, label), {}
    for name, folder in folders.items():
        _check_manifest_hashes(folder)
        try:
            if (folder / FILE).is_file():
                adapters[name] = _intervention_adapter(model, engine, label, folder)
            else:
                factors = {path: Factors(*pair) for path, pair in read_lora_factors(folder).items()}
                adapters[name] = EngineAdapter(
                    default=engine.add_adapter(low_rank_updates_of_linears(model.plan, factors))
                )
        except KernelError as error:
            raise no_adapter(f"{folder} doesn't fit {label}: {error}").rejection() from error
    return adapters


def _intervention_adapter(model: "DecoderModel", engine: "Engine", label: str, folder: Path) -> "EngineAdapter":
    from ...artifacts.reft import read_interventions
    from ...runtimes.native.adapters import EngineAdapter, Factors, low_rank_updates_behind_layers
    from ...runtimes.native.emission import BASE_HASH

    base = model.facts.get(BASE_HASH)
    if base is None:
        help = "compile it with this effc, which notes them"
        raise no_adapter(f"{label} doesn't say which tensors it was packed from", help=help).rejection()
    _refuse_other_base(folder, label, base)
    layers = read_interventions(folder)
    counts = {(layer.first, layer.last) for layer in layers.values()}
    if len(counts) > 1:
        raise no_adapter(f"{folder} edits other positions in one layer than in another").rejection()
    by_edge: dict[str, dict[str, Factors]] = {}
    for path, layer in layers.items():
        for edge, function in layer.functions_by_edge().items():
            by_edge.setdefault(edge, {})[path] = Factors(*function.low_rank_factors())
    numbers = {
        edge: engine.add_adapter(low_rank_updates_behind_layers(model.plan, factors))
        for edge, factors in by_edge.items()
    }
    ((n_first, n_last),) = counts
    both = numbers.get("both", -1)
    return EngineAdapter(-1, numbers.get("prefix", both), numbers.get("suffix", both), n_first, n_last)


def _with_lora(copied: Any, folder: Path) -> Any:
    from ...artifacts.adapter import load_peft_adapters
    from ...core.environment import check_modules

    check_modules(["peft"], "tune", "an adapter that peft wrote")
    return load_peft_adapters(folder, copied).get_base_model()


def _with_interventions(copied: Any, folder: Path) -> Any:
    from ...artifacts.reft import attach_interventions

    attach_interventions(copied, folder, check_base_hash=False)
    return copied.eval()


def _refuse_other_base(folder: Path, label: str, base_sha: str) -> None:
    """Hold interventions against the model; a LoRA does not say which tensors it was trained beside."""
    from ...artifacts.reft import other_base, read_reft_base_and_edits

    base, _ = read_reft_base_and_edits(folder)
    if base["sha256"] != base_sha:
        raise other_base(
            f"{folder} belongs to {base['place'] or 'the model beside it'}, and {label} has other tensors",
            help="serve the model that it was trained in",
        ).rejection()


def _check_manifest_hashes(folder: Path) -> None:
    """Compare with the manifest, where the folder is an artifact's."""
    from ...artifacts.manifest import NAME, read_manifest, verify_files

    if (folder.parent / NAME).is_file():
        verify_files(folder.parent, read_manifest(folder.parent), name_prefix=folder.name)


class AdapterChats:
    """Talkers by their adapter, "" for the plain model, one of whom answers until a prompt begins with another's name.

    A single adapter answers from the start. Raises Reject (no-adapter) for a name that is none.
    """

    def __init__(self, chat_sessions: "Mapping[str, ChatSession]"):
        self.chat_sessions = chat_sessions
        self.name = list(chat_sessions)[-1] if len(chat_sessions) == 2 else ""

    @property
    def has_chat_template(self) -> bool:
        return self.chat_sessions[""].has_chat_template

    def answer(self, prompt: str, on_text: Callable[[str], None]) -> "Reply":
        from .chat import Reply

        if prompt.startswith(":"):
            name, _, prompt = prompt[1:].partition(" ")
            if name not in self.chat_sessions:
                known = ", ".join(f"`:{one}`" for one in self.chat_sessions)
                raise no_adapter(f"there is no adapter `{name:.40}`", help=f"there are {known}").rejection()
            self.name = name
            if not prompt.strip():  # a line that only says who answers the next ones
                return Reply("", 0, 0, 0.0, "end")
        return self.chat_sessions[self.name].answer(prompt, on_text)
