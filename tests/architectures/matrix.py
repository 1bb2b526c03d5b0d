"""Architectures against passes: what works, and what is refused with which sentence.

    python -m tests.architectures.matrix [NAME ...]             print the table
    python -m tests.architectures.matrix --write [NAME ...]     and write compiler/core/architectures.json, which ships,
                                                                and the table in docs/architectures.md
    python -m tests.architectures.matrix --keep FOLDER [...]    put cells there as they are done, and take those that
                                                                are: what ended early goes on, several may share it
    python -m tests.architectures.matrix --column WORD [...]    only these columns, and what each architecture looks like
    python -m tests.architectures.matrix --seconds N [...]      begin no further architectures after so long
    python -m tests.architectures.matrix --lot N --seed S       N types that no row names, by lot: see lot.py; with
                                                                --write the page has the share that goes through

A cell is a recipe: what `check` and `plan` refuse of one with that pass is refused here; then the pass runs, the result
is emitted, and reopened in a fresh process. It is green, or refused with the diagnostic that refused it, or none where the architecture has no such thing.
Anything else, a traceback or a difference, is a failure: no cell of what ships is one.
"""

import argparse
import copy
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from effc.compiler.artifacts import verify_child
from effc.compiler.artifacts.output_comparison import compare_outputs
from effc.compiler.artifacts.verify import make_probe_inputs, opener_script_path
from effc.compiler.artifacts.verify_child import probe_model
from effc.compiler.core.architectures import Matrix, parse_architecture_matrix
from effc.compiler.evaluation import equivalence
from effc.compiler.ir.capture.capture import capture
from effc.compiler.plugin.target import Form
from effc.compiler.targets.native import Native
from effc.dsl.syntax.diagnostics import Reject
from torch import nn
from transformers import PreTrainedModel

from tests.architectures import lot, table
from tests.architectures.passes import (
    ENGINE,
    GREEN,
    NEEDS,
    NONE,
    STEPS,
    WORDS,
    Cell,
    emitted,
    has,
    packed,
    pruned,
    refusal,
)

ROOT = Path(__file__).parents[2]
SHIPPED, PAGE = ROOT / "compiler/core/architectures.json", ROOT / "docs/architectures.md"
LOOKS = ("capture", "other shape", "padded", "decode")
AT_ONCE = 6  # architectures whose artifacts one fresh process reopens
LENGTH = 40  # tokens of the rows that are probed: beyond windows and the lengths that stretched positions were made for


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
        unit.install_graph_forward(program.model)
    seen = list(
        zip(
            equivalence.record_logits_of_sample_calls(reference),
            equivalence.record_logits_of_sample_calls(program.model),
            strict=True,
        )
    )
    parts = {"capture": seen[:1], "other shape": seen[1:3], "padded": seen[3:5], "decode": seen[5:]}
    for look, pairs in parts.items():
        assert all(torch.equal(a, b) for a, b in pairs), f"{look}: the graphs compute something else"
    return {look: GREEN if pairs else NONE for look, pairs in parts.items()}


# -- all of it -----------------------------------------------------------------------------------------------


@dataclass
class ScorePairs:
    """An artifact that waits to be reopened, with what the model in memory computed of which inputs."""

    row: Row
    word: str
    folder: Path
    forms: list[Form]
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    model: nn.Module


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """What artifacts are verified with, in longer rows where they are of tokens."""
    given = make_probe_inputs(model)
    if "mask" not in given:
        return given
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(3, words, (len(given["ids"]), LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    hidden = slice(0, LENGTH // 3) if given["mask"][:, 0].min() == 0 else slice(-(LENGTH // 3), None)
    mask[len(ids) // 2 :, hidden] = 0
    return {"ids": ids, "mask": mask}


def run(
    names: list[str], words: Mapping[str, list[str]], folder: Path, tell: Callable[[str], None] = print
) -> list[Row]:
    """Rows of architectures, with some columns of each; what was emitted is reopened in one fresh process."""
    rows, written = [], []
    for name in names:
        row = Row(name)
        rows.append(row)
        watched(row, "capture", lambda row=row: row.cells.update(looks(table.model(row.name))))
        for word in words[name]:
            place = folder / name.replace(" ", "_") / word.replace(" ", "_")
            watched(
                row, f"{word} prune", lambda row=row, word=word, place=place: written.extend(attempt(row, word, place))
            )
        tell(summary(row, words[name]))
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


def attempt(row: Row, word: str, folder: Path) -> list[ScorePairs]:
    row.cells |= {f"{word} {step}": NONE for step in STEPS}
    if word in NEEDS and not has(row.name, NEEDS[word]):
        return []
    result = (packed if word in ENGINE else pruned)(row.name, word, folder)
    if isinstance(result, Cell):
        row.cells[f"{word} {STEPS[word in ENGINE]}"] = result
        return []
    if word not in ENGINE:
        row.cells[f"{word} prune"] = GREEN
    program, ctx = result
    row.cells[f"{word} emit"] = emitted(program, ctx, folder / "artifact", word in ENGINE)
    if row.cells[f"{word} emit"] is not GREEN:
        return []
    kind = (
        Native
        if word in ENGINE
        else ctx.registry.import_plugin_class("target", "hf" if is_stock(program.model) else "pt2")
    )
    forms = [form for form in kind(path="x").forms() if (folder / "artifact" / form.folder).is_dir()]
    assert forms, f"{row.name}: nothing was written that reloads"
    given = inputs(program.model)
    return [
        ScorePairs(row, word, folder / "artifact", forms, given, probe_model(program.model, given, 3), program.model)
    ]


def is_stock(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel)


def reopen(written: list[ScorePairs], folder: Path) -> None:
    """Load every folder in one fresh process, and compare what it computes with what was expected."""
    from safetensors.torch import save_file

    jobs = []
    for w in written:
        given = w.folder.parent / "inputs.safetensors"
        save_file(w.inputs, given)
        jobs += [
            [
                str(opener_script_path(form)),
                str(w.folder / form.folder),
                str(given),
                str(w.folder / f"{form.folder}.outputs"),
            ]
            for form in w.forms
        ]
    listed = folder / "jobs.json"
    listed.write_text(json.dumps(jobs))
    child = Path(__file__).with_name("reopen_child.py")
    done = subprocess.run(
        [sys.executable, "-P", str(child), verify_child.__file__, str(listed)],
        capture_output=True,
        text=True,
        timeout=7200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for w in written:
        wrong = [text for form in w.forms if (text := off(w, form))]
        w.row.cells[f"{w.word} reload"] = Cell("failed", wrong[0]) if wrong else GREEN


def off(w: ScorePairs, form: Form) -> str:
    """What a reopened folder computes that is not what the model in memory did; "" where all of it is."""
    from safetensors.torch import load_file

    place = w.folder / f"{form.folder}.outputs"
    if not place.is_file():
        return (w.folder / f"{form.folder}.outputs.error").read_text(encoding="utf-8")
    rounded = form.rounds(w.model) if form.rounds else None
    routes = rounded is not None and form.routes(w.folder / form.folder)
    dtype = next(w.model.parameters()).dtype
    checks = compare_outputs(form, w.expected, load_file(place), dtype, rounded, has_routed_experts=routes)
    return next((f"{c.what} differ by {c.worst:.3g}, allowed is {c.tolerance:.3g}" for c in checks if not c.holds), "")


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
        "passes": list(WORDS),
        "steps": list(STEPS),
        "rows": plain,
    }


def amended(found: dict) -> dict:
    """The shipped matrix with the rows that were run now."""
    known = json.loads(SHIPPED.read_text(encoding="utf-8"))
    rows = {name: known["rows"].get(name, {}) | found["rows"].get(name, {}) for name in table.ROWS}
    rows = {name: row for name, row in rows.items() if row}
    odd = set(table.NAMES) - set(rows)
    assert not odd, f"never run: {', '.join(odd)}"
    stages = {*LOOKS, *(f"{word} {step}" for word in WORDS for step in STEPS)}
    odd = [name for name, row in rows.items() if set(row) != stages]
    assert not odd, f"with other columns than before these are run anew: {', '.join(odd)}"
    return {**found, "rows": rows, "counts": counts(rows)}


def counts(rows: dict) -> dict[str, int]:
    states = [cell[0] for row in rows.values() for cell in row.values()]
    count = {state: states.count(state) for state in ("green", "refused")}
    return {**count, "total": sum(count.values())}


def kept(names: list[str], words: list[str], place: Path, seconds: float = math.inf) -> list[Row]:
    """The rows of some architectures; cells that lie in a folder are read, the others run, a few rows at a time."""
    until, rows = time.monotonic() + seconds, {name: read(name, place) for name in names}
    lacking = {name: [word for word in words if f"{word} prune" not in row.cells] for name, row in rows.items()}
    open_ = [name for name, row in rows.items() if lacking[name] or LOOKS[0] not in row.cells]
    for start in range(0, len(open_), AT_ONCE):
        if time.monotonic() > until:
            print(f"out of time: {', '.join(open_[start:])}")
            break
        few = open_[start : start + AT_ONCE]
        with tempfile.TemporaryDirectory() as folder:
            for row in run(few, lacking, Path(folder)):
                rows[row.name].cells.update(row.cells)
                keep(rows[row.name], place)
    return [row for row in rows.values() if row.cells]


def read(name: str, place: Path) -> Row:
    file = place / f"{name}.json"
    cells = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return Row(name, {stage: Cell(*cell) for stage, cell in cells.items()})


def keep(row: Row, place: Path) -> None:
    order = [*LOOKS, *(f"{word} {step}" for word in WORDS for step in STEPS)]
    cells = {stage: [row.cells[stage].state, row.cells[stage].why] for stage in order if stage in row.cells}
    (place / f"{row.name}.json").write_text(json.dumps(cells), encoding="utf-8")


def markdown_table(table: Matrix) -> str:
    """The matrix as a Markdown table: all looks at a capture in one column, a pass in two lines."""
    passes = [column for column in table.columns if column not in table.looks]
    head = ["", "capture", *(column.replace(".", ".<br>").replace(", ", ",<br>") for column in passes)]
    rows = [
        [name, _worst(cells[probe] for probe in table.looks), *(cells[column] for column in passes)]
        for name, cells in table.cells.items()
    ]
    rows = [["no" if cell == "refused" else cell for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join([*lines, "", table.summary + "."])


def _worst(results: Iterable[str]) -> str:
    """Of situations that a model may not know, as padding."""
    states = set(results)
    return next((state for state in ("refused", "ok") if state in states), "-")


def put_into(page: str, found: Matrix) -> str:
    """A page with this table in place of the one that it had."""
    start = page.index("|  | capture |")
    end = page.index("\n", page.index(" stages work", start))
    return f"{page[:start]}{markdown_table(found)}{page[end:]}"


def main(arguments: list[str]) -> None:
    asked = argparse.ArgumentParser(prog="python -m tests.architectures.matrix")
    asked.add_argument("names", nargs="*", default=list(table.ROWS), metavar="NAME")
    asked.add_argument("--write", action="store_true")
    asked.add_argument("--keep", type=Path)
    asked.add_argument("--column", nargs="*", default=list(WORDS), metavar="WORD", choices=WORDS)
    asked.add_argument("--seconds", type=float, default=math.inf)
    asked.add_argument("--lot", type=int, metavar="N")
    asked.add_argument("--types", nargs="*", metavar="TYPE")
    asked.add_argument("--seed", type=int, default=0, metavar="S")
    given = asked.parse_args(arguments)
    torch.set_num_threads(1)
    if unknown := set(given.types or ()) - lot.every_class().keys():
        asked.error(f"no such types: {', '.join(sorted(unknown))}")
    if given.lot or given.types is not None:
        drawn = lot.run(given.lot, given.seed) if given.lot else lot.run_types(given.types)
        if given.write:
            PAGE.write_text(lot.put_into(PAGE.read_text(encoding="utf-8"), drawn), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        place = given.keep or Path(folder)
        place.mkdir(exist_ok=True)
        rows = kept(given.names, given.column, place, given.seconds)
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
        found = amended(found)
        SHIPPED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(put_into(PAGE.read_text(encoding="utf-8"), parse_architecture_matrix(found)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
