"""`effc fmt`: one style, no options."""

import difflib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ....dsl.syntax.diagnostics import EXITS, Diagnostic, Reject
from ....dsl.syntax.source import Source
from .flags import SharedFlags, make_verb
from .options import argument, option

if TYPE_CHECKING:
    from ....dsl.syntax import ast

_files = argument("FILE...", "Recipe files; - reads stdin and writes stdout.", readable=False)
_check = option("Write nothing; exit 3 where a file is not in the style.", "--check")
_to = option(
    "Print one recipe in this form; FILE.json is read as the JSON form, which has no comments.",
    "--to",
    metavar="effspec|json",
)
_diff = option("Write nothing; print what would change.", "--diff")


def register(app: typer.Typer) -> None:
    @make_verb(app)
    def fmt(
        files: Annotated[list[Path], _files],
        shared: SharedFlags,
        check: Annotated[bool, _check] = False,
        diff: Annotated[bool, _diff] = False,
        to: Annotated[str | None, _to] = None,
    ) -> int:
        """Write recipes in the one style; comments stay."""
        if to is not None:
            return _print_converted(to, files, shared, check or diff)
        changed = []
        faults: list[Diagnostic] = []
        for path in files:
            try:
                source, after = source_and_formatted_text(path)
            except Reject as rejection:
                faults += rejection.diagnostics
                continue
            if source.text != after:
                changed.append(path)
            _write_or_diff(path, source, after, shared, check, diff)
        if faults:
            raise Reject(*faults)
        return _print_fmt_summary(files, changed, shared, check, diff)


def _print_converted(form: str, files: list[Path], shared: SharedFlags, has_options: bool) -> int:
    """Print one recipe to stdout, as text or as JSON."""
    if form not in ("effspec", "json"):
        raise typer.BadParameter(f"`--to {form}` is not known here: effspec, json")
    if len(files) != 1 or has_options:
        raise typer.BadParameter("`--to` prints one file and writes none")
    from ....dsl.syntax.format import format_file
    from ....dsl.syntax.json_form import file_to_json

    file = _parse_text_or_json(files[0])
    if form == "json":
        shared.screen.answer(json.dumps(file_to_json(file), indent=2, ensure_ascii=False))
        if n_comments := len(file.comments):
            from ...core.quantity import count_text

            shared.screen.note(f"left out {count_text(n_comments, 'comment')}: the JSON form has none")
    else:
        shared.screen.write(format_file(file))
    return 0


def _parse_text_or_json(path: Path) -> "ast.File":
    """Parse a file of text or JSON; Reject where it can't be read."""
    from ....dsl.syntax.json_form import file_from_json_text
    from ....dsl.syntax.parse import parse

    source = _source(path)
    if path.suffix == ".json" or (str(path) == "-" and source.text.lstrip().startswith("{")):
        return file_from_json_text(source)
    parsed = parse(source)
    if errors := [d for d in parsed.diagnostics if d.severity == "error"]:
        raise Reject(*errors)
    return parsed.file


def _source(path: Path) -> Source:
    from ....dsl.syntax.source_file import read_source

    return Source("<stdin>", sys.stdin.read()) if str(path) == "-" else read_source(path)


def source_and_formatted_text(path: Path) -> tuple[Source, str]:
    """A file and how it should look; Reject where it can't be parsed."""
    from ....dsl.syntax.format import format_source

    source = _source(path)
    return source, format_source(source)


def _write_or_diff(
    path: Path, source: Source, formatted: str, shared: SharedFlags, check_only: bool, show_diff: bool
) -> None:
    if show_diff:
        lines = difflib.unified_diff(
            source.text.splitlines(keepends=True), formatted.splitlines(keepends=True), f"{path}", f"{path} (formatted)"
        )
        shared.screen.write(_color_diff("".join(lines), shared))
    elif str(path) == "-" and not check_only:
        shared.screen.write(formatted)
    elif source.text != formatted and not check_only:
        from ...core.cache import write_atomic

        write_atomic(path, formatted.encode())


def _color_diff(text: str, shared: SharedFlags) -> str:
    styles = {"+": "green", "-": "red", "@": "cyan"}
    lines = [shared.screen.styled(line, styles[line[0]]) if line[:1] in styles else line for line in text.splitlines()]
    return "\n".join(lines) + "\n" if lines else ""


def _print_fmt_summary(
    files: list[Path], changed: list[Path], shared: SharedFlags, check_only: bool, show_diff: bool
) -> int:
    from ...core.quantity import count_text

    if shared.format == "json":
        names = [str(p) for p in changed]
        status = "error" if changed and check_only else "ok"
        shared.screen.answer_json("fmt", status, changed=names, files=len(files))
    elif str(files[0]) != "-" or check_only:
        for path in changed:
            shared.screen.note(f"{'would change' if check_only or show_diff else 'formatted'} {path}")
        if not changed:
            shared.screen.note(f"{count_text(len(files), 'file')} in style")
    return EXITS["recipe"] if changed and check_only else 0
