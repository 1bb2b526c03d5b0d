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
import functools
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
from effc.compiler.capture.sample import sample
from effc.compiler.checkpoints.origin import Origin
from effc.compiler.ir.program import Program
from effc.compiler.measuring import equivalence
from effc.compiler.report.architectures import Matrix, markdown, matrix
from effc.compiler.rows.forward import predicts
from effc.compiler.words.context import Context, Settings
from effc.compiler.words.shelf import Shelf
from effc.dsl.diagnostics import Reject
from effc.dsl.recipe import Invocation, Recipe
from effc.dsl.source import Source
from effc.dsl.values import Bytes, DataRef, MetricRef, Ratio
from torch import nn
from transformers import PreTrainedModel

from tests.architectures import table

ROOT = Path(__file__).parents[2]
SHIPPED, PAGE = ROOT / "compiler/report/architectures.json", ROOT / "docs/architectures.md"
LOOKS = ("capture", "other shape", "padded", "decode")
STEPS = ("prune", "emit", "reload")
AT_ONCE = 6  # architectures whose artifacts one fresh process reopens
_SCORE = MetricRef("divergence", (("data", DataRef("rows")),))
_ALIKE = MetricRef("similarity", (("data", DataRef("rows")), ("of", "both"), ("by", "cosine"), ("pooling", "auto")))
_SCORED = {"on": None, "search": "racing", "reorder": None, "data": None, "score": None, "repair": True}
PASSES = {
    "prune.blocks": {"remove": 1, "score": _SCORE, "on": None, "unit": "branch", "search": "racing"},
    "prune.channels": {**_SCORED, "keep": Ratio(0.75, "channels"), "align": 4},
    "prune.heads": {**_SCORED, "keep": Ratio(0.5, "heads")},
    "prune.multi": {
        "remove": Ratio(0.1, "params"),
        "score": _SCORE,
        "group": 8,
        "heads": 1,
        "on": None,
        "split": None,
        "order": ("blocks", "channels", "heads"),
        "search": "racing",
        "rank": None,
        "reorder": None,
        "repair": None,
        "data": None,
        "width_score": None,
        "clock": MetricRef("decode.p50"),
        "check": None,
    },
    "prune.experts": {"keep": Ratio(0.5, "experts"), "on": None, "data": DataRef("rows")},
    "clean.dead": {"align": 4},
    "shed.blocks": {"remove": 1, "score": _SCORE, "on": None, "search": "racing"},
    "shed.ssm": {"remove": 1, "score": _SCORE, "on": None, "search": "racing"},
    "shed.heads": {"keep": Ratio(0.5, "heads"), "on": None, "score": None, "search": "racing", "step": 1, "data": None},
    "shed.channels": {
        "keep": Ratio(0.5, "channels"),
        "on": None,
        "score": None,
        "search": "racing",
        "align": 16,
        "repair": True,
        "data": None,
    },
    "shed.state": {"keep": Ratio(0.5, "states"), "on": None, "score": None, "search": "racing", "step": 1},
    "shed.multi": {
        "remove": Ratio(0.1, "params"),
        "score": _SCORE,
        "on": None,
        "split": None,
        "search": "racing",
        "rank": None,
        "repair": None,
        "group": 16,
        "heads": 1,
        "experts": 1,
        "states": 4,
        "data": None,
        "order": ("blocks", "scans", "channels", "heads", "experts", "scan_heads", "scan_channels", "states"),
        "clock": MetricRef("decode.p50"),
    },
}
NEEDS = {  # passes for what only some have: where there is none, there is nothing to say
    "prune.experts": "experts",
    "shed.blocks": "ssm",
    "shed.ssm": "ssm",
    "shed.heads": "ssm_heads",
    "shed.channels": "ssm_channels",
    "shed.state": "ssm_state",
    "shed.multi": "ssm",
}


@dataclass(frozen=True)
class Cell:
    """`state`: "green", "refused" with the sentence why, "none" where there is nothing to do, or "failed"."""

    state: str
    why: str = ""

    def __str__(self) -> str:
        return {"green": "ok", "none": "-"}.get(self.state, self.state)


GREEN, NONE = Cell("green"), Cell("none")


@dataclass
class Row:
    """One architecture: its cells by stage, `prune.heads emit` for those of a pass."""

    name: str
    cells: dict[str, Cell] = field(default_factory=dict)


def refusal(reject: Reject) -> Cell:
    return Cell("refused", "; ".join(d.message for d in reject.diagnostics))


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


# -- passes --------------------------------------------------------------------------------------------------


def context(model: nn.Module, folder: Path, name: str) -> Context:
    config = (
        {**model.config.to_dict(), "architectures": [type(model).__name__]}
        if hasattr(model, "config")
        else table.PLAIN_CONFIGS.get(name, {})
    )
    origin = Origin(name, config, None, name, lambda: table.model(name), lambda: table.model(name), lambda: None)
    rows = {"count": 2, "length": 12, "seed": 0}
    recipe = Recipe(
        Source("matrix.effspec", "effspec 1\n"), "", {}, {}, {"rows": Invocation("synthetic", rows)}, {}, {}
    )
    work = folder / "work"
    work.mkdir(parents=True)
    return Context(Settings(folder / "cache", threads=1), recipe, folder, Shelf(), origin, work)


def masked(program: Program) -> None:
    """Make something dead, for `clean.dead` to find: the first items of every group, or else a branch."""
    skeleton = program.skeleton
    groups = [g for g in skeleton.groups if g.kind in ("channels", "heads", "kv_heads")]
    with torch.no_grad():
        for group in groups:
            for member in group.members[-group.readers :]:
                block = group.per_block or group.count
                few = 4 if group.kind == "channels" and block > 4 else 1  # experts lose four at a time
                items = [start + i for start in range(0, group.count, block) for i in range(few)]
                dead = torch.tensor([i for item in items for i in member.indices(item)])
                program.model.get_parameter(member.tensor).index_fill_(member.axis, dead, 0.0)
        if not groups and skeleton.branches:
            for path in skeleton.branches[0].parts:
                for parameter in program.model.get_submodule(path).parameters():
                    parameter.zero_()


def pruned(name: str, word: str, folder: Path) -> tuple[Program, Context] | Cell:
    """The program after a pass, or how it was refused. Asserts that it is smaller and computes what its graphs do."""
    model = table.model(name)
    ctx = context(model, folder, name)
    try:
        program = capture(model)
        if word == "clean.dead":
            masked(program)
        before, version = sum(p.numel() for p in model.parameters()), program.version
        ctx.shelf.make("pass", Invocation(word, asked(word, model))).run(program, ctx)
        if program.version == version:
            return Cell("refused", f"`{word}` changed nothing")
    except Reject as reject:
        return refusal(reject)
    after = sum(p.numel() for p in model.parameters())
    shared = any(unit.edited for unit in program.units.values())  # one call less of a block that others call
    assert after < before or shared, f"{name}: {word} took nothing"
    for unit in program.units.values():
        if not unit.edited:
            unit.bind(model)
    bound = equivalence.observe(model)
    for unit in program.units.values():
        if not unit.edited:
            unit.unbind(model)
    assert equivalence.distance(equivalence.observe(model), bound) == 0.0, f"{name}: {word} left graphs that differ"
    return program, ctx


def asked(word: str, model: nn.Module) -> dict:
    """What a pass is asked for; models without a head are scored by their hidden states."""
    given = PASSES[word]
    with torch.no_grad():
        predicted = predicts(model(**sample(model)))
    return given if predicted or given.get("score") is None else given | {"score": _ALIKE}


@functools.cache
def has(name: str, kind: str) -> bool:
    """Whether a model has such parts, by names of modules: that discovery finds them is what is to be seen."""
    names = {path.rpartition(".")[2] for path, _ in table.model(name).named_modules()}
    params = {path.rpartition(".")[2] for path, _ in table.model(name).named_parameters()}
    scans = "A_log" in params
    return {
        "experts": "experts" in names,
        "ssm": scans,
        "ssm_heads": scans and "x_proj" not in names,
        "ssm_channels": scans and "x_proj" in names,
        "ssm_state": scans,
    }[kind]


def emitted(program: Program, ctx: Context, into: Path) -> Cell:
    into.mkdir(parents=True)
    word = "hf" if isinstance(program.model, PreTrainedModel) else "pt2"
    args = {"path": "x", "form": "auto", "shard": Bytes(5 * 10**9)} if word == "hf" else {"path": "x"}
    try:
        ctx.shelf.make("target", Invocation(word, args)).emit(program, into, ctx)
    except Reject as reject:
        return refusal(reject)
    return GREEN


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
