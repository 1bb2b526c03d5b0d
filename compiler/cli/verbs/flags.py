"""The flags that every verb takes, declared once.

`@verb(app)` turns a function of `shared: Shared` and its own parameters into a command: it adds the shared
flags, hides from `--help` those that can't matter to the verb (they are accepted everywhere, so that a script
may pass one list), and hands every exception to the one exit path in `exits.py`.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

from ....dsl.checker.profiles import MAX_THREADS
from ...core.settings import MAX_SEED, UNDECIDED, Settings
from .exit_codes import VerbException
from .options import option
from .output import Screen

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ...core.events import Listener
    from ...driver.api import Session

FORMATS = ("text", "json", "github", "junit", "md")


def parse_size(text: str) -> int:
    """`20GiB`, `500MB`, `1073741824`."""
    from ...core import options

    with _as_parameter_error(text):
        return options.parse_byte_count(text)


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m` or `30min`, `2h`."""
    from ...core import options

    with _as_parameter_error(text):
        return options.parse_duration_with_unit(text)


@contextmanager
def _as_parameter_error(text: str) -> Iterator[None]:
    """Errors of options as those of a flag with that text."""
    from ...core.options import OptionError

    try:
        yield
    except OptionError as error:
        raise typer.BadParameter(f"`{text:.40}` {error}") from error


def finite_or_bad_parameter(value: float | None) -> float | None:
    """A callback of options that take fractions: NaN keeps every bound, since it is compared with none."""
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"{value} is no number that can be kept to")
    return value


def _make_flag_option(panel: str, help: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, show_envvar=False, **options)


_quiet = _make_flag_option("speech", "Say nothing but the answer and errors.", "--quiet", "-q")
_verbose = _make_flag_option("speech", "Say more; twice: everything.", "--verbose", "-v", count=True)
_format = _make_flag_option("speech", "How to print the answer.", "--format")
_color = _make_flag_option("speech", "Colour: on a terminal, always or never.", "--color", metavar="auto|always|never")
_debug = _make_flag_option("speech", "Show the traceback of an internal error.", "--debug")
_sets = _make_flag_option("inputs", "Give a `param` another value; repeatable.", "--set", metavar="NAME=VALUE")
_params = _make_flag_option("inputs", "Values of params, from a JSON file.", "--params", metavar="FILE")
_offline = _make_flag_option("machine", "Never use the network.", "--offline", envvar="EFFC_OFFLINE")
_cache = _make_flag_option(
    "cache", "Where finished steps are kept.", "--cache-dir", metavar="FOLDER", envvar="EFFC_CACHE_DIR"
)
_trust = _make_flag_option("machine", "Run Python that a model brings along.", "--trust-remote-code")
_seed = _make_flag_option(
    "machine", "Seed of all that is random; 0 unless given.", "--seed", metavar="N", min=0, max=MAX_SEED
)
_device = _make_flag_option(
    "machine",
    "Where passes and metrics compute: cpu unless given; cuda, cuda:1, mps, auto.",
    "--device",
    metavar="NAME",
)
_threads = _make_flag_option("machine", "Threads of torch.", "--threads", metavar="N", min=1, max=MAX_THREADS)
_memory = _make_flag_option(
    "machine", "Memory allowed, such as 20GiB.", "--max-memory", metavar="SIZE", parser=parse_size
)
_still = _make_flag_option("progress", "No progress on stderr.", "--no-progress")
_events = _make_flag_option("progress", "Write progress as JSON lines to a file.", "--events", metavar="FILE")

_undecided = _make_flag_option(
    "gate", "What a timed bound comes to that this machine can't decide.", "--undecided", metavar="fail|pass"
)
_locked = _make_flag_option("lock", "Refuse what is not as effspec.lock has it.", "--locked")

_required_key = option(
    "Use the artifact only if this public key signed it; repeatable, one of them must.",
    "--require-signature",
    metavar="KEY",
)
_SIGNED = inspect.Parameter(
    "require_signature", inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[list[str], _required_key], default=[]
)

mapped_weights = option(
    "Leave weights of a native artifact on disk, checked in place, or copy them first. Mapped unless said "
    "otherwise: those above a quarter of the memory.",
    "--mapped/--copied",
)

speculation_option = option(
    "Let the native engine verify several tokens at once where the text may repeat itself; off unless stated.",
    "--speculation/--no-speculation",
)

pipeline_option = option("This pipeline of the recipe alone; repeatable.", "--pipeline", metavar="NAME")

knowledge_url = option(
    "Of a folder of `rttc`: take samples from this server, not from the folder.", "--knowledge", metavar="URL"
)


@dataclass(frozen=True)
class SharedFlags:
    """Options of every verb. The panel of a flag says which verbs show it in their help."""

    quiet: Annotated[bool, _quiet] = False
    verbose: Annotated[int, _verbose] = 0
    format: Annotated[str, _format] = "text"
    color: Annotated[str, _color] = "auto"
    debug: Annotated[bool, _debug] = False
    sets: Annotated[list[str], _sets] = ()  # type: ignore[assignment]
    params: Annotated[Path | None, _params] = None
    offline: Annotated[bool, _offline] = False
    cache_dir: Annotated[Path | None, _cache] = None
    trust_remote_code: Annotated[bool, _trust] = False
    seed: Annotated[int, _seed] = 0
    device: Annotated[str, _device] = "cpu"
    threads: Annotated[int | None, _threads] = None
    max_memory: Annotated[int | None, _memory] = None
    no_progress: Annotated[bool, _still] = False
    events: Annotated[Path | None, _events] = None
    undecided: Annotated[str, _undecided] = "fail"
    locked: Annotated[bool, _locked] = False
    signed_by: ClassVar[tuple[str, ...]] = ()  # of an object, the keys of `--require-signature`

    @cached_property
    def screen(self) -> Screen:
        return Screen(self.format, self.color, self.quiet, self.verbose)

    @property
    def overrides(self) -> dict[str, str]:
        """Values of `--set` by name."""
        pairs = [text.partition("=") for text in self.sets]
        for name, equals, _ in pairs:
            if not equals or not name.strip():
                raise typer.BadParameter("`--set` takes NAME=VALUE, such as --set keep=80%")
        return {name.strip(): value.strip() for name, _, value in pairs}

    @property
    def cache_folder(self) -> Path:
        from ....dsl.syntax.source_file import irregular_kind_of_path
        from ...core.cache import default_cache_folder

        folder = self.cache_dir or default_cache_folder()
        if folder.exists() and not folder.is_dir():
            raise typer.BadParameter(
                f"the cache is a folder, and {folder} is {irregular_kind_of_path(folder) or 'a file'}: "
                "name another by --cache-dir or EFFC_CACHE_DIR"
            )
        return folder

    def require_environment(self) -> None:
        """Refuse packages out of range, an unusable device or kernel level, before any work."""
        from ....kernels.levels import active_level
        from ...core.device import refuse_unusable_device
        from ...core.environment import refuse_missing_packages

        refuse_missing_packages()
        active_level()
        refuse_unusable_device(self.device)

    def session(self, recipe: Path, listener: "Listener | None" = None, pipelines: Sequence[str] = ()) -> "Session":
        """Open a session of one recipe with what the flags say; a name of the library where there is no such file."""
        from ...driver.api import open_session
        from ...plugin.recipe_library import resolve_recipe_path

        session = open_session(
            resolve_recipe_path(recipe), settings=self.settings(listener), set=self.overrides, params=self.params
        )
        session.pipelines = tuple(pipelines)
        return session

    def listening(self) -> "AbstractContextManager[Listener]":
        """Progress as the flags want it: bars on a terminal, lines elsewhere, JSON lines in a file."""
        from ...core.progress_bars import listening_to_progress

        if self.events and not self.events.absolute().parent.is_dir():  # said before anything is computed
            raise typer.BadParameter(f"`--events {self.events}`: there is no folder {self.events.parent}")
        live = sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
        return listening_to_progress(
            quiet=self.quiet,
            progress=not self.no_progress,
            bars=live,
            color=self.screen.colors(sys.stderr),
            verbose=self.verbose,
            events_path=self.events,
            on_warning=self.screen.warn,
        )

    def settings(self, listener: "Listener | None" = None) -> Settings:
        """Settings of the compiler."""
        from ...core.events import silent

        hub_offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        return Settings(
            self.cache_folder,
            self.seed,
            self.device,
            self.offline or hub_offline,
            self.trust_remote_code,
            self.max_memory,
            self.threads,
            self.undecided,
            self.locked,
            listener or silent,
            signed_by=self.signed_by,
        )


class Verb(TyperCommand):
    """A command whose help lists its own options first and the shared ones after them."""

    def invoke(self, ctx) -> Any:
        try:
            return super().invoke(ctx)
        except VerbException as carried:
            if getattr(carried.error, "ctx", ctx) is None:  # a wrong flag, which the verb itself refuses
                carried.error.ctx = ctx  # type: ignore[attr-defined]  # of click's usage errors, which alone get here
            raise

    def format_usage(self, ctx, formatter) -> None:
        arguments = [_metavar(p, ctx) for p in self.get_params(ctx) if p.param_type_name == "argument"]
        formatter.write_usage(ctx.command_path, " ".join(["[OPTIONS]", *arguments]))

    def format_options(self, ctx, formatter) -> None:
        shared = {f.name for f in fields(SharedFlags)} - {"format"}
        sections: dict[str, list] = {"Arguments": [], "Options": [], "Shared options": []}
        for item in self.get_params(ctx):
            record = item.get_help_record(ctx)
            if item.param_type_name == "argument":
                sections["Arguments"].append((_metavar(item, ctx), item.help or (record or ("", ""))[1]))
            elif record is not None:
                sections["Shared options" if item.name in shared else "Options"].append(record)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(name, text.replace("\\[", "[")) for name, text in rows])


def _metavar(argument, ctx) -> str:
    """Metavar of an argument in help; typer fills in `metavar` itself only from 0.21 on."""
    return argument.metavar or argument.make_metavar(ctx)


def make_verb(
    app: typer.Typer,
    name: str | None = None,
    *,
    formats: tuple[str, ...] = ("text", "json"),
    flag_panels: tuple[str, ...] = (),
    signed_arguments: tuple[str, ...] | None = None,
) -> Callable:
    """Make a command. `flag_panels` names the panels of shared flags that matter to it, beside "speech".

    signed_arguments   its parameters that are artifacts, of which `--require-signature` asks for a signature before it
                       runs; of models that its recipe takes from artifacts, too
    """

    def wrap(run: Callable) -> Callable:
        parameters = [p for n, p in inspect.signature(run, eval_str=True).parameters.items() if n != "shared"]
        parameters += [] if signed_arguments is None else [_SIGNED]
        names = {p.name for p in parameters}  # a verb's own option goes before a shared one of that name
        shared_names = [f.name for f in fields(SharedFlags) if f.name not in names]
        added = [_shared_parameter(name, formats, ("speech", *flag_panels)) for name in shared_names]

        def command(**arguments: Any) -> int:
            shared = SharedFlags(**{name: arguments.pop(name) for name in shared_names})
            if shared.offline:  # before huggingface_hub is imported, which reads it once
                os.environ["HF_HUB_OFFLINE"] = "1"
            try:
                _refuse_unknown_choices(shared, formats)
                _refuse_control_characters({**arguments, **vars(shared)})
                if keys := arguments.pop(_SIGNED.name, ()):
                    object.__setattr__(shared, "signed_by", tuple(keys))
                    _verify_signers_of_artifact_arguments(
                        {name: arguments[name] for name in signed_arguments or ()}, keys, shared.screen
                    )
                return run(shared=shared, **arguments) or 0
            except BaseException as error:
                raise VerbException(error, shared) from error

        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__signature__ = inspect.Signature([*parameters, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*parameters, *added)}
        app.command(name, cls=Verb)(command)
        return run

    return wrap


def _shared_parameter(name: str, formats: tuple[str, ...], visible_panels: tuple[str, ...]) -> inspect.Parameter:
    from copy import copy
    from typing import get_args, get_type_hints

    kind, option = get_args(get_type_hints(SharedFlags, include_extras=True)[name])
    option = copy(option)
    option.hidden = option.rich_help_panel not in visible_panels
    if name == "format":
        option.metavar, option.hidden = "|".join(formats), len(formats) == 1
    default = next(f.default for f in fields(SharedFlags) if f.name == name)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind, option],
        default=list(default) if default == () else default,
    )


def _refuse_unknown_choices(shared: SharedFlags, formats: tuple[str, ...]) -> None:
    for name, value, legal in (
        ("--format", shared.format, formats),
        ("--color", shared.color, ("auto", "always", "never")),
        ("--undecided", shared.undecided, UNDECIDED),
    ):
        if value not in legal:
            raise typer.BadParameter(f"`{name} {value}` is not known here: {', '.join(legal)}")


def _verify_signers_of_artifact_arguments(arguments: Mapping[str, Any], keys: Sequence[str], screen: Screen) -> None:
    """Raises Reject for an artifact, or for that of `NAME=FOLDER`, that none of the keys signed; notes files that no
    signature covers."""
    from ...artifacts.load import verify_signature_and_files

    for name, value in arguments.items():
        for path in _artifact_paths(name, value):
            verify_signature_and_files(path, keys)
            note_uncovered_files(path, screen)


def _artifact_paths(name: str, value: Any) -> list[Path]:
    from ...apps.serving.adapters import folder_by_adapter_of_option
    from .model_sources import split_model_argument

    if isinstance(value, (str, Path)):
        return [Path(value)]
    if name == "adapter":
        return [folder for option in value for folder in folder_by_adapter_of_option(option).values()]
    return [path if isinstance(path, Path) else Path(split_model_argument(path)[1]) for path in value]


def note_uncovered_files(artifact: Path, screen: Screen) -> None:
    """Note which files of an artifact, or of that which a form belongs to, no hash covers."""
    from ...artifacts.load import artifact_of_form_or_point
    from ...artifacts.manifest import uncovered_files_text

    uncovered = uncovered_files_text(artifact_of_form_or_point(artifact) or artifact)
    if uncovered:
        screen.note(f"{artifact}: {uncovered}")


SPOKEN = ("prompt", "sets")  # what a model is told, and values that the recipe's own check reads


def _refuse_control_characters(arguments: Mapping[str, Any]) -> None:
    """Names and paths drive no terminal and end no line of ours; what a system can't spell in UTF-8 is no such mark."""
    from ....dsl.syntax.control_characters import control_character_error, first_control_character

    for name in arguments.keys() - set(SPOKEN):
        value = arguments[name]
        for text in value if isinstance(value, (list, tuple)) else [value]:
            character = isinstance(text, (str, Path)) and first_control_character(
                os.fsencode(text).decode("utf-8", "replace")
            )
            if character:
                raise typer.BadParameter(control_character_error(f"`{name.replace('_', '-')}`", character).message)
