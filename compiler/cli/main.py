"""`effc`: the command line. Verbs live in commands/, every way out leads through `main`."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Annotated

import typer
from typer.core import TyperGroup

from ...dsl.syntax.diagnostics import EXITS, Reject
from ..core.stopping import stop_requested
from .confinement import TEMPORARY, confine_verb
from .verbs.exit_codes import VerbException, diagnostics_of_exception, exit_codes_help_text, show_traceback
from .verbs.help_sections import SECTIONS
from .verbs.interrupt import mark_stop_as_announced, raise_or_exit_on_signal, stop_sentence
from .verbs.output import Screen, exit_code_of
from .verbs.pipe_streams import ReaderLeft, make_streams_pipe_safe, raise_if_stdout_was_full

VERBS = """
    check fmt new tune explain lsp catalogue packages imports lock plan compile pick run serve federate test bisect diff
    inspect report verify sign cache doctor bench
""".split()  # modules of verbs/
MAPPING = ("compile", "pick", "run", "serve", "federate", "test", "bisect", "diff", "inspect", "verify", "bench")
HOMES = {
    "passes": "catalogue",
    "recipes": "catalogue",
    "add": "packages",
    "update": "packages",
    "vendor": "packages",
    "import": "imports",
}


class Verbs(TyperGroup):
    """The list of verbs by what they are for, and the exit codes below it."""

    def format_commands(self, ctx, formatter) -> None:
        for title, names in SECTIONS.items():
            with formatter.section(title):
                commands = [(n, self.get_command(ctx, n)) for n in names]
                formatter.write_dl([(n, c.get_short_help_str(200)) for n, c in commands if c], col_max=10)

    def format_epilog(self, ctx, formatter) -> None:
        formatter.write(f"\nExit codes:\n{exit_codes_help_text()}\n")


def _print_version_and_exit(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print(f"effc {version('effc')}")
        raise typer.Exit()


_version_flag = typer.Option(
    "--version",
    callback=_print_version_and_exit,
    is_eager=True,
    show_default=False,
    help="Print the version and leave.",
)


def effc(context: typer.Context, version: Annotated[bool, _version_flag] = False) -> None:
    """Compile a model-optimization recipe (.effspec) into a smaller, faster model that reloads.

    Start with `effc tune MODEL`, which searches a recipe, or with `effc new`, which writes one to compile and run.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def make_app(argv: Sequence[str] = ()) -> typer.Typer:
    """The command with the verb that is called, or with all where none is: each costs some milliseconds."""
    application = typer.Typer(
        cls=Verbs,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        subcommand_metavar="VERB ...",
    )
    application.callback(invoke_without_command=True)(effc)
    called = HOMES.get(argv[0], argv[0]) if argv else ""
    for name in [called] if called in VERBS else VERBS:
        import_module(f".verbs.{name}", __package__).register(application)
    return application


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns its exit code."""
    if argv is None:
        make_streams_pipe_safe()
        confine_verb(sys.argv[1:])  # before a thread begins, and never a process that only calls this
    if argv is None and len(sys.argv) > 1 and sys.argv[1] in MAPPING:
        from ...kernels.native import report_truncated_mapped_files

        report_truncated_mapped_files()  # in a process of our own alone: a signal's handler is everybody's
    code = _run_until_stdout_is_full(sys.argv[1:] if argv is None else argv)
    if argv is None and code == EXITS["interrupted"]:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        TEMPORARY.close()
        os._exit(code)  # taking torch apart takes seconds, and a person waits
    return code


def _run_until_stdout_is_full(argv: list[str]) -> int:
    _set_library_environment()
    code = 0
    try:
        with raise_or_exit_on_signal(stop_sentence(argv)):
            code = _invoke_and_get_exit_code(argv)
            raise_if_stdout_was_full()
        return code
    except (KeyboardInterrupt, OSError) as error:  # stdout is full
        code_on_leave = _report_and_get_exit_code(VerbException(error, None), argv)
        _discard_unwritable_output()
        return code or code_on_leave  # what was found before is not made good by a disk


def _invoke_and_get_exit_code(argv: list[str]) -> int:
    try:
        # `--dump-ir` alone is short for its commonest value; typer knows no optional values.
        arguments = ["--dump-ir=changed" if a == "--dump-ir" else a for a in argv]
        result = make_app(arguments)(args=arguments, prog_name="effc", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except VerbException as carried:
        return _report_and_get_exit_code(carried, argv)
    except typer.Exit as exit:
        return exit.exit_code
    except typer.Abort as error:
        return _report_and_get_exit_code(VerbException(KeyboardInterrupt(), None), argv) if error else 0
    except (KeyboardInterrupt, Exception) as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # `effc cache` alone; not every click has the class
            print(error.ctx.get_help())  # that class has a context
            return 0
        return _report_and_get_exit_code(VerbException(error, None), argv)


def _is_interruption(error: BaseException) -> bool:
    """Whether a verb says in its own words that it was stopped."""
    return isinstance(error, Reject) and all(d.exit == EXITS["interrupted"] for d in error.diagnostics)


def _report_and_get_exit_code(verb_exception: VerbException, argv: list[str]) -> int:
    error, shared = verb_exception.error, verb_exception.shared
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, ReaderLeft):
        return 0
    if stop_requested() and not _is_interruption(error):
        error = KeyboardInterrupt()
    diagnostics = diagnostics_of_exception(error, shared.cache_dir if shared else None, argv)
    if shared.debug if shared else "--debug" in argv:
        show_traceback(error)
    screen = shared.screen if shared else _screen_by_unparsed_flags(argv)
    screen.complain(diagnostics, argv[0] if argv else "")
    mark_stop_as_announced()
    return exit_code_of(diagnostics)


def _screen_by_unparsed_flags(argv: list[str]) -> Screen:
    """A screen for a command line that could not be read: what its flags would have said."""
    joined = " ".join(argv).replace("=", " ").split()
    options = dict(pairwise(joined))
    form = options.get("--format", "text")
    return Screen(form if form in ("json", "github") else "text", options.get("--color", "auto"))


def _discard_unwritable_output() -> None:
    """Drop output that stdout can't take, so that Python does not try again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set_library_environment() -> None:
    """Libraries write to stderr on their own; ours is the only progress and the only complaint. And threads of torch
    spin for milliseconds at every meeting, on cores that the others may need: on a machine that is shared, a compile by
    two threads took twenty times as long as by one. They wait for about 0.4 ms, and let go: with a tenth of that the
    small operations of plain torch, and so every original that is timed, took two to three times as long."""
    import warnings

    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("ORT_DISABLE_TELEMETRY", "1"),
        ("GOMP_SPINCOUNT", "10000"),
    ):
        os.environ.setdefault(name, value)
    if "-v" not in sys.argv and "--verbose" not in sys.argv and "--debug" not in sys.argv:
        warnings.simplefilter("ignore")
