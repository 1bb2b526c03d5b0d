"""The one exit path: every exception becomes diagnostics and an exit code of `dsl.diagnostics.EXITS`."""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ....dsl.syntax.diagnostics import EXITS, Diagnostic, Fault, Reject
from ...core.resource_errors import RAISE_FILE_LIMIT, disk_full_errno, is_out_of_memory
from .interrupt import stop_sentence

if TYPE_CHECKING:
    from .flags import SharedFlags

UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")

internal = Fault(
    "internal",
    "effc itself broke: an assumption in its code, or in a library that it calls, does not hold.\n\n"
    "Run the same command with `--debug` and report the traceback with the recipe.",
    exit="failure",
)
usage = Fault(
    "usage",
    "A command was called with flags or arguments that it does not know.\n\n"
    "`effc VERB --help` lists what a verb takes.",
    exit="usage",
)
interrupted = Fault(
    "interrupted",
    "The command was stopped from outside.\n\n"
    "Nothing is half written: artifacts and cached steps appear whole or not at all, and `compile` goes on "
    "where it was stopped.",
    exit="interrupted",
    severity="note",
)
no_memory = Fault(
    "no-memory",
    "The machine gave no more memory.\n\n"
    "Lower `--max-memory`, use fewer or shorter rows of data, or a machine with more.",
    exit="resources",
)
no_space = Fault(
    "no-space",
    "A disk is full, or a file would be larger than the system allows.\n\n"
    "`effc cache gc` frees what is no longer used, and `--cache-dir` moves the cache; `ulimit -f` shows the limit on "
    "the size of a file.",
    exit="resources",
)
no_access = Fault("no-access", "A file or folder can't be read or written.", exit="environment")
file_cut = Fault(
    "file-cut",
    "A file that was mapped became shorter while it was read, or its disk can't be read.\n\n"
    "Weights of models and artifacts are mapped, and the system ends whoever reads what is no longer there. Nothing is "
    "half written: `compile` goes on where it was, unless files of the model were written since.",
    exit="environment",
)  # told by kernels/src/mapped.cc
no_level = Fault(
    "no-such-isa",
    "`EFFC_ISA` names a level of instruction sets that does not exist, or that this machine lacks.\n\n"
    "Unset it to run the native kernels at the highest level; `effc doctor` says which that is.",
    exit="environment",
)
kernel_error = Fault(
    "kernel-refused",
    "A native kernel was given what it can't work with, or the compiled kernels are not here.\n\n"
    "Kernels check sizes and packed weights before they read them, and say here what they found.",
    exit="environment",
)
no_network = Fault(
    "no-network",
    "A server that was needed did not answer.\n\n"
    "What has been downloaded once is used without the network; `--offline` says so from the start.",
    exit="network",
)

MEANINGS = {
    "success": "success, also where all was cached",
    "failure": "a pass or effc itself broke",
    "usage": "a wrong flag or argument, or a folder that is there already",
    "recipe": "the recipe is refused",
    "gate": "an expectation is missed",
    "environment": "a model, file, package or processor feature is missing or does not suit",
    "resources": "memory, disk or time ran out",
    "work-to-do": "`plan --detailed-exitcode`: there is work to do",
    "network": "the network or the model hub is unreachable",
    "interrupted": "interrupted; compile again goes on from there",
}

_NETWORK = ("huggingface_hub", "requests", "httpx", "httpcore", "urllib3")


class VerbException(Exception):
    """Brings an exception out of a verb past typer, with the flags of that verb."""

    def __init__(self, error: BaseException, shared: "SharedFlags | None"):
        super().__init__(str(error))
        self.error, self.shared = error, shared


def diagnostics_of_exception(
    error: BaseException, cache: Path | None = None, argv: Sequence[str] = ()
) -> Sequence[Diagnostic]:
    """Diagnostics for an exception of a command line; `cache` is the folder of finished steps, where it is another."""
    match error:
        case Reject():
            return error.diagnostics
        case KeyboardInterrupt():
            return [interrupted(stop_sentence(argv))]
    if isinstance(error, UsageError):
        return [_usage_diagnostic(error)]
    text = str(error)
    if is_out_of_memory(error):
        return [_out_of_memory_diagnostic(error)]
    if (code := disk_full_errno(error)) is not None:
        return [_no_space_diagnostic(code, _file_name_of_error(error), cache)]
    if type(error).__module__.split(".")[0] in _NETWORK:
        return [
            no_network(
                _first_line_without_full_stop(error), help="check the connection; --offline uses what was downloaded"
            )
        ]
    if _has_class_named(error, "NoSuchLevel"):
        return [no_level(text, help="unset EFFC_ISA, or name a level that is here")]
    if _has_class_named(error, "KernelError"):
        return [
            kernel_error(_first_line_without_full_stop(error), help="`effc doctor` says what the kernels find here")
        ]
    if isinstance(error, PermissionError):
        return [no_access(f"no permission: {_file_name_of_error(error)}")]
    if isinstance(error, OSError) and error.filename:
        return [no_access(f"{(error.strerror or type(error).__name__).lower()}: {_file_name_of_error(error)}")]
    return [
        internal(
            f"{type(error).__name__}: {_first_line_without_full_stop(error)}" if text else type(error).__name__,
            help="run again with --debug to see the traceback, and report it with the recipe",
        )
    ]


def exit_codes_help_text() -> str:
    """The codes as `effc --help` lists them."""
    return "\n".join(f"  {code:>3}  {MEANINGS[name]}" for name, code in EXITS.items())


def _has_class_named(error: BaseException, name: str) -> bool:
    return any(c.__name__ == name for c in type(error).__mro__)


def _no_space_diagnostic(code: int, file: str, cache: Path | None) -> Diagnostic:
    """Only what lies in the cache is freed by its verb; of a file that somebody named, the disk is theirs."""
    from ...core.cache import default_cache_folder

    where = f" at {file}" if file else ""
    if code == errno.EFBIG:
        return no_space(f"a file is larger than this system allows{where}", help=RAISE_FILE_LIMIT)
    cache_folder = os.path.abspath(cache or default_cache_folder())
    free_cache, free_disk = "`effc cache gc` frees what is no longer used", "make room on its disk"
    if not file:
        help = f"{free_disk}; if the cache is on it, {free_cache}"
    elif Path(os.path.abspath(file)).is_relative_to(cache_folder):
        help = free_cache
    else:
        help = f"{free_disk}, or name a file on another one"
    return no_space(f"the disk is full{where}", help=help)


def _out_of_memory_diagnostic(error: BaseException) -> Diagnostic:
    text = str(error)
    request = text[text.find("tried to allocate") :].split(".")[0] if "tried to allocate" in text else ""
    return no_memory(
        "memory ran out" + (f": {request}" if request else ""),
        help="finished steps are cached; lower --max-memory or give fewer rows of data",
    )


def _usage_diagnostic(error) -> Diagnostic:
    """Typer's words in our style: what is wrong, and apart from it what to do."""
    message = error.format_message().replace("Invalid value: ", "").strip()
    path = error.ctx.command_path if getattr(error, "ctx", None) else "effc"
    help = f"`{path} --help` lists what it takes"
    for mark in (" Did you mean ", " (Possible options: ", " (Did you mean one of: "):
        message, separator, suggestion_text = message.partition(mark)
        if separator:
            help = f"did you mean {suggestion_text.partition('? (')[0].rstrip('?)')}?"  # two libraries may each say it
            break
    if message.startswith("No such option"):  # in quotes from click 8.5 on
        message, help = message.replace("'", ""), help.replace("'", "")
    for typer_text, replacement in _USAGE.items():
        if message.startswith(typer_text):
            message = replacement + message.removeprefix(typer_text)
    return usage(message.rstrip(".").replace("'", "`"), help=help.replace("'", "`"))


_USAGE = {
    "No such option: ": "unknown option ",
    "No such option ": "unknown option ",
    "No such command ": "unknown verb ",
    "Missing argument ": "missing argument ",
    "Missing option ": "missing option ",
    "Got unexpected extra ": "unexpected ",
    "Option ": "option ",
    "Invalid value for ": "unfit value for ",
}


def _file_name_of_error(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return str(name) if name else ""


def _first_line_without_full_stop(error: BaseException) -> str:
    """The first line of a message, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".")[:300] if lines else type(error).__name__


def show_traceback(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error, file=sys.stderr)
