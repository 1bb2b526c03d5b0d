"""Verbs that read what others made, confined before anything of it is opened: see SECURITY.md."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from ...dsl.syntax.diagnostics import Reject

VERBS = ("verify", "inspect", "run", "doctor", "diff", "serve")
_TEXTS = ("-p", "--prompt", "--cache-dir", "--access-log", "--otlp")  # options whose value is no file of the model
SWITCHES = (  # options of `effc serve` without a value: the word behind one is a model
    "--reload", "--insecure", "--mapped", "--copied", "--speculation", "--no-speculation", "--quiet", "--verbose",
    "--debug", "--offline", "--trust-remote-code", "--no-progress", "--locked", "--help",
)  # fmt: skip
TEMPORARY = ExitStack()  # removes temporary files when it is closed
atexit.register(TEMPORARY.close)
_LOCAL_ENGINES = ("auto", "flat", "faiss")  # others read their own settings, and ask servers


def confine_verb(argv: Sequence[str]) -> None:
    """Confine this process to the folders that a command line names, where its verb opens artifacts or models.

    Not confined: what trains or downloads, reads a recipe of one's own, runs code that was granted, or computes on an
    accelerator.
    """
    if not argv or argv[0] not in VERBS:
        return
    options = _values_by_option(argv[1:])
    words = [word for name, values in options.items() if name not in _TEXTS for word in values]
    words += [word.partition("=")[2] for word in words]  # NAME=FOLDER
    paths = [Path(word) for word in words if word and os.path.exists(word)]
    folders = [path for path in paths if path.is_dir()]
    trains = argv[0] == "run" and any(_target_name_in_manifest(folder) == "flower" for folder in folders)
    elsewhere = trains or any(path.suffix == ".effspec" and path.is_file() for path in paths)
    elsewhere |= any(word.startswith("hf:") for word in words)  # they are fetched
    elsewhere |= _last_value_of_option(options, "--engine", "auto") not in _LOCAL_ENGINES
    granted = "--trust-remote-code" in options or options.get("--device", ["cpu"]) != ["cpu"]
    if elsewhere or granted or not folders or (argv[0] == "doctor" and "--trust" not in options):
        return
    from ..core.cache import default_cache_folder
    from ..core.sandbox import confine_process

    cache = Path(_last_value_of_option(options, "--cache-dir", str(default_cache_folder())))
    bases = [base for folder in folders for base in _base_folder_of_interventions(folder)]
    results = [path for folder in folders if not (path := Path(f"{folder}-result")).is_symlink()]  # of a federation
    roots = [
        root for root in map(_artifact_or_repository_root, bases) if _target_name_in_manifest(root)
    ]  # a manifest.json is not always an artifact's
    readable = [*paths, *map(_artifact_or_repository_root, folders), *bases, *roots, *results, _hub_cache()]
    if argv[0] == "serve" and "--reload" in options:
        readable += [
            around for folder in _served_folders(options) for around in parent_folders_of_folder_and_link(folder)
        ]
    writable = [cache, _make_process_temporary_folder(cache), *_create_access_log_file(options)]
    asks = "--knowledge" in options or "--otlp" in options
    confine_process(readable, writable, "any" if asks else "listen" if argv[0] == "serve" else "none")


def parent_folders_of_folder_and_link(folder: Path) -> list[Path]:
    """Folders in which a new version of a folder appears, under its name or as another target of its link."""
    return [folder.absolute().parent, _artifact_or_repository_root(folder).parent]


def _served_folders(options: dict[str, list[str]]) -> list[Path]:
    """Folders of models and adapters that `effc serve` names; those of no other option."""
    is_switch = {name: name in SWITCHES or not name.startswith("--") for name in options}
    models = [word for name, words in options.items() if is_switch[name] for word in words]
    locations = [word if os.path.exists(word) else word.partition("=")[2] for word in models]
    locations += [word.partition("=")[2] for word in options.get("--adapter", [])]
    return [Path(location) for location in locations if location and os.path.isdir(location)]


def _last_value_of_option(options: dict[str, list[str]], name: str, default: str) -> str:
    """Value of an option; the default also where a value is missing, which the verb's parser says."""
    return (options.get(name) or [default])[-1]


def _target_name_in_manifest(folder: Path) -> str:
    """Target that a folder's manifest names; "" where it names none."""
    from ..core.safe_read import MALFORMED, MANIFEST, read_json

    with suppress(OSError, Reject, *MALFORMED):
        return str(read_json(folder / "manifest.json", MANIFEST)["kind"])
    return ""


def _make_process_temporary_folder(cache: Path) -> Path:
    """Folder of this process's temporary files: in the cache, where that can be written and others can't, as `effc
    cache gc` finds there what a killed process left."""
    from ..core.sealed_json import refuse_writable_by_others
    from ..core.temporary_folder import make_temporary_folder

    parent, work = None, cache / "work"
    with suppress(OSError, Reject):  # the verb says why
        refuse_writable_by_others(cache)
        work.mkdir(parents=True, exist_ok=True)
        parent = work if os.access(work, os.W_OK) and not work.is_symlink() else None
    folder = make_temporary_folder(parent)
    TEMPORARY.callback(shutil.rmtree, folder, ignore_errors=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    return folder


def _create_access_log_file(options: dict[str, list[str]]) -> list[Path]:
    """The file that a server writes its log to, which is there from now on: what does not exist can't be allowed."""
    file = _last_value_of_option(options, "--access-log", "-")
    if file in ("-", "none"):
        return []
    with suppress(OSError):  # the verb says why
        open(file, "a").close()
    return [Path(file)]


def _values_by_option(words: Sequence[str]) -> dict[str, list[str]]:
    """Words behind each option, by its name, whether it takes a value or not; those behind none by ""."""
    values: dict[str, list[str]] = {}
    option = ""
    for word in words:
        if word.startswith("-") and option not in _TEXTS:
            option, equals, value = word.partition("=")
            values.setdefault(option, []).extend([value] if equals else [])
            option = "" if equals else option
        else:
            values.setdefault(option, []).append(word)
            option = ""
    return values


def _hub_cache() -> Path:
    """Folder of models that were fetched: interventions may belong to one of them."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))


def _base_folder_of_interventions(folder: Path) -> list[Path]:
    """The folder that interventions name as their base, where a model lies in it: they may name any folder."""
    from ..core.safe_read import CONFIG, MALFORMED, MANIFEST, read_json

    for file in (folder / "reft.json", folder / "reft" / "reft.json"):
        with suppress(OSError, Reject, *MALFORMED):
            base = Path(read_json(file, MANIFEST)["base"]["place"])
            model_type = base.is_absolute() and read_json(base / "config.json", CONFIG)["model_type"]
            return [base] if isinstance(model_type, str) and any(base.glob("*.safetensors")) else []
    return []


def _artifact_or_repository_root(model_folder: Path) -> Path:
    """Folder of whatever a folder of a model belongs to: an artifact, or a repository in the hub's cache."""
    model_folder = model_folder.resolve()
    above, top = model_folder.parent, model_folder.parent.parent
    is_point = above.name == "points" and (top / "manifest.json").is_file()
    if is_point or (above.name == "snapshots" and top.is_relative_to(_hub_cache().resolve())):
        return top
    return above if (above / "manifest.json").is_file() else model_folder
