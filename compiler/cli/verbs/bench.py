"""`effc bench`: what the native kernels do on this machine."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....dsl.syntax.diagnostics import EXITS
from .flags import SharedFlags, make_verb
from .options import option

if TYPE_CHECKING:
    from ...transforms.lowering.kernel_table import Table

_only = option(
    "Parts by commas: gemv, block, rows, prefill, attention, pack; all unless given.", "--only", metavar="PARTS"
)
_seconds = option("Time for each contender of a line.", "--seconds", metavar="S", show_default=True)
_shape = option("Outputs and inputs that `gemv` measures; repeatable.", "--shape", metavar="NxK")
_gate = option("Exit with 4 where a target is missed.", "--gate")


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Measure what effc brings along.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="bench")

    @group.callback()
    def bench() -> None:
        """Measure what effc brings along."""

    @make_verb(group, flag_panels=("machine",))
    def kernels(
        shared: SharedFlags,
        only: Annotated[str, _only] = "",
        seconds: Annotated[float, _seconds] = 0.3,
        shape: Annotated[list[str] | None, _shape] = None,
        gate: Annotated[bool, _gate] = False,
    ) -> int:
        """Race the native kernels against torch's strongest, and compare with their targets.

        Ratios within a line are what counts: all take turns over weights that no cache holds, and samples in
        which the system took a processor away are thrown out. `of read` compares with reading as many bytes;
        a missed target says the most that this allows.
        """
        shapes = [_parse_shape(text) for text in shape or ()]
        from ...core.fingerprint import usable_cpu_count
        from ...transforms.lowering.kernel_table import PARTS, SHAPES, Table, goals_summary, table_environment

        parts = [p.strip() for p in only.split(",") if p.strip()] or list(PARTS)
        unknown = [p for p in parts if p not in PARTS]
        if unknown:
            raise typer.BadParameter(f"`--only {unknown[0]}` is no part: {', '.join(PARTS)}")
        if not 0 < seconds <= 600:
            raise typer.BadParameter("`--seconds` is more than 0 and at most 600")
        shared.require_environment()
        threads = shared.threads or usable_cpu_count()
        screen, plain = shared.screen, shared.format == "text"
        table = Table(seconds, threads)
        if plain:
            table.on_line = lambda line: screen.answer(line.as_table_text() + "\n")
        where = table_environment(table)
        if plain:
            screen.answer(_environment_line(where) + "\n")
        table.measure_parts(parts, shapes or SHAPES)
        missed = [t for t in table.targets if not t.met]
        code = EXITS["gate"] if gate and missed else 0
        if plain:
            screen.answer(goals_summary(table.targets))
        else:
            screen.answer_json("bench kernels", "error" if code else "ok", **_table_json(table, where, code))
        return code


def _table_json(table: "Table", environment: dict, exit_code: int) -> dict[str, Any]:
    return {
        "exit": exit_code,
        "machine": environment,
        "lines": [line.to_json() for line in table.lines],
        "targets": [t.to_json() for t in table.targets],
    }


def _parse_shape(text: str) -> tuple[int, int]:
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(n.strip().isdecimal() and 0 < int(n) <= 1 << 20 for n in numbers):
        raise typer.BadParameter(f"`--shape {text}` is no shape: write outputs x inputs, such as 1536x576")
    return int(numbers[0]), int(numbers[1])


def _environment_line(machine_facts: dict) -> str:
    return (
        f"{machine_facts.get('cpu', 'a processor without a name')}, {machine_facts.get('cpus', '?')} processors here; "
        f"torch {machine_facts.get('torch')}; kernels {machine_facts['kernels']}; {machine_facts['threads']} threads; "
        f"{machine_facts['bursts']} bursts; load {machine_facts['load']}"
    )
