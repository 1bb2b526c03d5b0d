"""`effc import`: a recipe of another tool, written as `.effspec`; what has no equivalent becomes a comment."""

import re
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.source import Source
from .flags import SharedFlags, make_verb
from .options import argument, option

if TYPE_CHECKING:
    from ..importing.steps import Imported

nothing_to_import = Fault(
    "nothing-to-import",
    "A file given to `effc import` is no recipe of a tool that effc knows, or nothing of it has an equivalent.\n\n"
    "Known are llm-compressor's YAML, with modifiers such as `GPTQModifier`, and Olive's JSON, with `passes`.",
)
import_there = Fault("import-there", "A file that `effc import` should write is there already.", exit="usage")

_file = argument("FILE", "llm-compressor's YAML, or Olive's JSON.")
_output = option("Where to write it; printed unless given.", "-o", "--output", metavar="FILE")
_model = option(
    "The model, where the file names none: zoo:NAME or ORG/NAME.", "--model", metavar="MODEL", show_default=True
)


def register(app: typer.Typer) -> None:
    @make_verb(app, "import", flag_panels=())
    def import_(
        file: Annotated[Path, _file],
        shared: SharedFlags,
        output: Annotated[Path | None, _output] = None,
        model: Annotated[str, _model] = "zoo:tiny-llama",
    ) -> None:
        """Write another tool's recipe as .effspec, with comments for what has no equivalent."""
        from ...core.cache import write_atomic
        from ..importing import llm_compressor, olive
        from ..importing.reading import parse_json_or_yaml_file

        body, source = parse_json_or_yaml_file(file)
        tool = next((t for t in (olive, llm_compressor) if t.recognizes(body)), None)
        if tool is None:
            message = f"{file} is no recipe of llm-compressor or Olive"
            raise nothing_to_import(message, help="it has no modifiers and no `passes`").rejection()
        if output and output.exists():
            raise import_there(f"{output} exists", help="name another file with -o").rejection()
        imported = tool.import_recipe(body)
        text, left = checked_recipe_and_remarks(
            imported, _model_source_expression(imported.model or model), Path(source.name).name, shared
        )
        if output:
            write_atomic(output, text.encode())
        if shared.format == "json":
            return shared.screen.answer_json("import", text=text, path=str(output) if output else None, left=left)
        if not output:
            return shared.screen.write(text)
        shared.screen.answer(str(output))
        return shared.screen.note(f"next: read its comments, then effc plan {quote(str(output))}")


def _model_source_expression(model: str) -> str:
    """Source expression for a model that a foreign file names by a path or a repository."""
    kind, colon, name = model.partition(":")
    if colon and kind == "zoo" and re.fullmatch(r"[\w-]+", name):
        return f'zoo("{name}")'
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith((".", "/", "~")):
        return f'hf("{model}")'
    return f'hf("./{model}")'


def checked_recipe_and_remarks(
    imported: "Imported", model: str, name: str, shared: SharedFlags
) -> tuple[str, list[str]]:
    """The recipe as text, and remarks on all that has no equivalent. Steps are (name, call, remarks)."""
    from ....dsl.syntax.format import format_source

    sound: list[tuple[str, str, list[str]]] = []
    remarks = list(imported.remarks)
    for step in imported.steps:
        errors = _check_errors_of_text(_render_recipe(imported.tool, model, name, [*sound, step], [], []), shared)
        if errors:
            remarks.append(f"{step[1]}: {errors[0]}")
        else:
            sound.append(step)
    if not sound:
        raise nothing_to_import(f"nothing of {name} has an equivalent here", note="\n".join(remarks[:20])).rejection()
    emits = (
        ["onnx"]
        if "onnx" in imported.emits and "onnx" in shared.session(Path(name)).registry.vocabulary.words("target")
        else []
    )
    if "onnx" in imported.emits and not emits:
        remarks.append("this effc writes no ONNX: the checkpoint can be exported from its folder")
    text = _render_recipe(imported.tool, model, name, sound, remarks, emits)
    left = [*remarks, *(remark for _, _, step_remarks in sound for remark in step_remarks)]
    return format_source(Source(name, text)), left


def _render_recipe(
    tool: str, model: str, name: str, steps: list[tuple[str, str, list[str]]], remarks: list[str], emits: list[str]
) -> str:
    safe_name = re.sub(r"[^\w.-]", "_", name)
    lines = [
        "effspec 1",
        f'"""What {safe_name} asks of {tool}, as far as effc has it."""',
        "",
        "# Texts that come with effc stand in place of the calibration data: put yours there.",
        "use std.text",
        "",
        f"model base = {model}",
        "",
        *(f"# {remark}" for remark in remarks),
        "pipeline made(base) {",
    ]
    for step, call, remark in steps:
        lines += [*(f"  # {text}" for text in remark), f"  {step} = {call}"]
    lines += ["}", "", "expect made { perplexity(text.heldout) <= 1.2 * base }", ""]
    targets = " ".join(f'{target}("{target}")' for target in ("hf", *emits))
    lines += [f"emit made {{ {targets} }}", ""]
    return "\n".join(lines)


def _check_errors_of_text(text: str, shared: SharedFlags) -> list[str]:
    """Errors of a recipe, independent of its model."""
    from ....dsl.checker.check import check_recipe_file
    from ....dsl.syntax.parse import parse

    parsed = parse(Source("imported.effspec", text))
    session = shared.session(Path("imported.effspec"))
    diagnostics = check_recipe_file(
        parsed.file, session.registry.vocabulary, read_module=session.read_library_module
    ).diagnostics
    return [d.message for d in (*parsed.diagnostics, *diagnostics) if d.severity == "error"]
