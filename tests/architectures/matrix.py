"""Architectures against passes: what works, and what is refused with which sentence.

    python -m tests.architectures.matrix [NAME ...]             print the table
    python -m tests.architectures.matrix --write [NAME ...]     and write compiler/report/architectures.json, which ships,
                                                                and the table in docs/architectures.md
    python -m tests.architectures.matrix --keep FOLDER [...]    put rows there as they are done, and take those that
                                                                are: what ended early goes on, several may share it

A cell is green, or refused with the diagnostic that refused it, or none where the architecture has no such thing.
Anything else, a traceback or a difference, is a failure: no cell of what ships is one.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from effc.compiler.artifacts import verify_child
from effc.compiler.artifacts.verify import compare, inputs_of
from effc.compiler.artifacts.verify_child import probe
from effc.compiler.capture.capture import capture
from effc.compiler.measuring import equivalence
from effc.compiler.report.architectures import Matrix, markdown, matrix
from effc.dsl.diagnostics import Reject
from torch import nn
from transformers import PreTrainedModel

from tests.architectures import table
from tests.architectures.passes import GREEN, NEEDS, NONE, PASSES, STEPS, Cell, emitted, has, pruned, refusal

ROOT = Path(__file__).parents[2]
SHIPPED, PAGE = ROOT / "compiler/report/architectures.json", ROOT / "docs/architectures.md"
LOOKS = ("capture", "other shape", "padded", "decode")
AT_ONCE = 6  # architectures whose artifacts one fresh process reopens


@dataclass
class Row:
    """One architecture: its cells by stage, `prune.heads emit` for those of a pass."""

    name: str
    cells: dict[str, Cell] = field(default_factory=dict)


# -- capture -------------------------------------------------------------------------------------------------


def looks(model: nn.Module) -> dict[str, Cell]:
    """Whether the graphs compute what the model's own forward does, situation by situation."""
    reference = copy.deepcopy(model)
    try:
        program = capture(model)
    except Reject as reject:
        return {look: refusal(reject) if look == LOOKS[0] else NONE for look in LOOKS}
    for unit in program.units.values():
        unit.bind(program.model)
    seen = list(zip(equivalence.observe(reference), equivalence.observe(program.model), strict=True))
    parts = {"capture": seen[:1], "other shape": seen[1:3], "padded": seen[3:5], "decode": seen[5:]}
    for look, pairs in parts.items():
        assert all(torch.equal(a, b) for a, b in pairs), f"{look}: the graphs compute something else"
    return {look: GREEN if pairs else NONE for look, pairs in parts.items()}


# -- all of it -----------------------------------------------------------------------------------------------


@dataclass
class Written:
    """An artifact that waits to be reopened, with what the model in memory computed."""

    row: Row
    word: str
    folder: Path
    forms: list
    expected: dict[str, torch.Tensor]
    dtype: torch.dtype


def run(names: list[str], words: list[str], folder: Path, tell: Callable[[str], None] = print) -> list[Row]:
    """The rows of some architectures; everything that was emitted is reopened in one fresh process."""
    rows, written = [], []
    for name in names:
        row = Row(name)
        rows.append(row)
        watched(row, "capture", lambda row=row: row.cells.update(looks(table.model(row.name))))
        for word in words:
            place = folder / name.replace(" ", "_") / word
            watched(
                row, f"{word} prune", lambda row=row, word=word, place=place: written.extend(attempt(row, word, place))
            )
        tell(summary(row, words))
    reopen(written, folder)
    return rows


def watched(row: Row, stage: str, work: Callable[[], object]) -> None:
    """Whatever isn't a refusal is noted as a failure, so that one doesn't hide the others."""
    try:
        work()
    except Exception as error:  # a pass or a model's forward may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        row.cells[stage] = Cell(
            "failed", f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        )


def attempt(row: Row, word: str, folder: Path) -> list[Written]:
    row.cells |= {f"{word} {step}": NONE for step in STEPS}
    if word in NEEDS and not has(row.name, NEEDS[word]):
        return []
    result = pruned(row.name, word, folder)
    if isinstance(result, Cell):
        row.cells[f"{word} prune"] = result
        return []
    row.cells[f"{word} prune"] = GREEN
    program, ctx = result
    row.cells[f"{word} emit"] = emitted(program, ctx, folder / "artifact")
    if row.cells[f"{word} emit"] is not GREEN:
        return []
    target = "hf" if isinstance(program.model, PreTrainedModel) else "pt2"
    forms = [
        form
        for form in ctx.shelf.load("target", target)(path="x").forms()
        if (folder / "artifact" / form.folder).is_dir()
    ]
    assert forms, f"{row.name}: nothing was written that reloads"
    expected = probe(program.model, inputs_of(program.model), 3)
    return [Written(row, word, folder / "artifact", forms, expected, next(program.model.parameters()).dtype)]


def reopen(written: list[Written], folder: Path) -> None:
    """Load every folder in one fresh process, and compare what it computes with what was expected."""
    from safetensors.torch import load_file, save_file

    jobs = []
    for w in written:
        given = w.folder.parent / "inputs.safetensors"
        save_file(inputs_of(table.model(w.row.name)), given)
        jobs += [
            [form.opens, str(w.folder / form.folder), str(given), str(w.folder / f"{form.folder}.outputs")]
            for form in w.forms
        ]
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    child = Path(__file__).with_name("reopen_child.py")
    done = subprocess.run(
        [sys.executable, "-P", str(child), verify_child.__file__, str(listed)],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for w in written:
        for form in w.forms:
            found = load_file(w.folder / f"{form.folder}.outputs")
            wrong = [
                f"{c.what} differ by {c.worst:.3g}, allowed is {c.tolerance:.3g}"
                for c in compare(form, w.expected, found, w.dtype)
                if not c.holds
            ]
            if wrong:
                break
        w.row.cells[f"{w.word} reload"] = Cell("failed", wrong[0]) if wrong else GREEN


# -- the table -----------------------------------------------------------------------------------------------


def summary(row: Row, words: list[str]) -> str:
    def cell(stage: str) -> str:
        return str(row.cells.get(stage, NONE))

    said = [f"{row.name:16}", *(f"{cell(look):8}" for look in LOOKS)]
    return " ".join([*said, *("/".join(cell(f"{word} {step}") for step in STEPS) for word in words)])


def body(rows: list[Row]) -> dict:
    """The matrix as plain data: refusals by stage, everything else is green or has nothing to do."""
    import transformers

    plain = {
        row.name: {stage: [cell.state, cell.why] if cell.why else [cell.state] for stage, cell in row.cells.items()}
        for row in rows
    }
    return {
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "counts": counts(plain),
        "looks": list(LOOKS),
        "passes": list(PASSES),
        "steps": list(STEPS),
        "rows": plain,
    }


def amended(found: dict) -> dict:
    """The shipped matrix with the rows that were run now."""
    known = json.loads(SHIPPED.read_text(encoding="utf-8"))
    rows = {name: found["rows"].get(name, known["rows"].get(name)) for name in table.NAMES}
    odd = [name for name, row in rows.items() if row is None or set(found["passes"]) != set(known["passes"])]
    assert not odd, f"with other passes than before all rows are run anew: {', '.join(odd)}"
    return {**found, "rows": rows, "counts": counts(rows)}


def counts(rows: dict) -> dict[str, int]:
    states = [cell[0] for row in rows.values() for cell in row.values()]
    count = {state: states.count(state) for state in ("green", "refused")}
    return {**count, "total": sum(count.values())}


def kept(names: list[str], place: Path) -> list[Row]:
    """The rows of some architectures; those that lie in a folder are read, the others run, a few at a time."""

    def file(name: str) -> Path:
        return place / f"{name}.json"

    for start in range(0, len(names), AT_ONCE):
        few = [name for name in names[start : start + AT_ONCE] if not file(name).is_file()]
        with tempfile.TemporaryDirectory() as folder:
            done = run(few, list(PASSES), Path(folder)) if few else []
        for row in done:
            cells = {stage: [cell.state, cell.why] for stage, cell in row.cells.items()}
            file(row.name).write_text(json.dumps(cells), encoding="utf-8")
    return [
        Row(name, {s: Cell(*c) for s, c in json.loads(file(name).read_text(encoding="utf-8")).items()})
        for name in names
    ]


def put_into(page: str, found: Matrix) -> str:
    """A page with this table in place of the one that it had."""
    start = page.index("|  | capture |")
    end = page.index("\n", page.index(" stages work", start))
    return f"{page[:start]}{markdown(found)}{page[end:]}"


def main(arguments: list[str]) -> None:
    asked = argparse.ArgumentParser(prog="python -m tests.architectures.matrix")
    asked.add_argument("names", nargs="*", default=list(table.NAMES), metavar="NAME")
    asked.add_argument("--write", action="store_true")
    asked.add_argument("--keep", type=Path)
    given = asked.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = given.keep or Path(folder)
        place.mkdir(exist_ok=True)
        rows = kept(given.names, place)
    for row in rows:
        for stage, cell in row.cells.items():
            if cell.state in ("refused", "failed"):
                print(f"{row.name}: {stage}: {'' if cell.state == 'refused' else 'FAILED '}{cell.why}")
    found = body(rows)
    print(found["counts"])
    failed = [row.name for row in rows for cell in row.cells.values() if cell.state == "failed"]
    if failed:
        raise SystemExit(f"{len(failed)} cells failed")
    if given.write:
        if len(given.names) < len(table.NAMES):
            found = amended(found)
        SHIPPED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(put_into(PAGE.read_text(encoding="utf-8"), matrix(found)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
