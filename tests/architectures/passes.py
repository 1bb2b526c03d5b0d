"""A pass on an architecture: with which arguments, what must hold of the result, and its cell of the matrix."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.core.settings import Settings
from effc.compiler.evaluation import equivalence
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.capture.sample import sample_inputs
from effc.compiler.ir.program import Program
from effc.compiler.models.checkpoints.origin import Origin
from effc.compiler.models.rows.forward import has_logits
from effc.compiler.plugin.context import Context
from effc.compiler.plugin.registry import Registry
from effc.compiler.targets.native import Native
from effc.dsl.checker.recipe import Invocation, Recipe
from effc.dsl.checker.values import Bytes, DataRef, MetricRef, Ratio
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.source import Source
from torch import nn
from transformers import PreTrainedModel

from tests.architectures import table
from tests.architectures.checks import refused

STEPS = ("prune", "emit", "reload")


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
        "estimate": "none",
        "together": 1,
        "overshoot": True,  # of a model of three layers one is a third
        "rank": None,
        "reorder": None,
        "repair": None,
        "data": None,
        "width_score": None,
        "clock": MetricRef("decode.p50"),
        "check": None,
    },
    "prune.experts": {"keep": Ratio(0.5, "experts"), "on": None, "data": DataRef("rows")},
    "prune.hidden": {
        "keep": Ratio(0.75, "width"),
        "data": DataRef("rows"),
        "reorder": None,
        "repair": True,
        "align": 8,
    },
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
        "estimate": "none",
        "together": 1,
        "overshoot": True,  # of a model of three layers one is a third
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
    "sparsify.wanda": {"sparsity": Ratio(0.5, "weights"), "data": DataRef("rows")},
    "tune.heal": {"data": DataRef("rows"), "steps": 2, "batch": 2, "lr": 0.01},
}
HALF = {"prune.multi, bfloat16": "prune.multi"}  # a pass on weights of half precision
ENGINE = {"native": torch.float32, "native, bfloat16": torch.bfloat16}  # no pass: what the engine makes of such weights
WORDS = (*PASSES, *HALF, *ENGINE)


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


def refusal(reject: Reject) -> Cell:
    """A refused cell: the errors' messages, with the note where a part is missing, which says why it is."""
    errors = [d for d in reject.diagnostics if d.severity == "error"]
    noted = [f"{d.message}: {d.note}" if d.slug == "nothing-to-select" and d.note else d.message for d in errors]
    return Cell("refused", "; ".join(noted))


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
    return Context(Settings(folder / "cache", threads=1), recipe, folder, Registry(), origin, work)


def masked(program: Program) -> None:
    """Make something dead, for `clean.dead` to find: the first items of every group, or else a branch."""
    skeleton = skeleton_of(program)
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
    """The program after a pass, or how it, or a recipe of it, was refused. Asserts that it is smaller and computes what its graphs do."""
    model = table.model(name)
    if reject := refused(model, HALF.get(word, word), arguments(HALF.get(word, word), model), folder.parent / "cache"):
        return refusal(reject)
    ctx = context(model, folder, name)
    if word in HALF:
        word, model = HALF[word], in_halves(model)
    try:
        program = capture(model)
        if word == "clean.dead":
            masked(program)
        before, version = _extent(model), program.version
        ctx.registry.make("pass", Invocation(word, arguments(word, model))).run(program, ctx)
        if program.version == version:
            return Cell("refused", f"`{word}` changed nothing")
    except Reject as reject:
        return refusal(reject)
    _assert_changed(word, before, program)
    for unit in program.units.values():
        if not unit.edited:
            unit.install_graph_forward(model)
    bound = equivalence.record_logits_of_sample_calls(model)
    for unit in program.units.values():
        if not unit.edited:
            unit.restore_class_forward(model)
    assert equivalence.max_difference(equivalence.record_logits_of_sample_calls(model), bound) == 0.0, (
        f"{name}: {word} left graphs that differ"
    )
    return program, ctx


@dataclass(frozen=True)
class _Extent:
    numbers: int
    zeros: int
    sum: float


def _extent(model: nn.Module) -> _Extent:
    held = list(model.parameters())
    zeros = sum(int((p == 0).sum()) for p in held)
    return _Extent(sum(p.numel() for p in held), zeros, sum(float(p.detach().double().abs().sum()) for p in held))


def _assert_changed(word: str, before: _Extent, program: Program) -> None:
    """What a pass promises: fewer numbers, more zeros, or other numbers."""
    after = _extent(program.model)
    shared = any(unit.edited for unit in program.units.values())  # one call less of a block that others call
    if word == "tune.heal":
        assert after.sum != before.sum, f"{word} learned nothing"
    elif word == "sparsify.wanda":
        assert after.zeros > before.zeros and after.numbers == before.numbers, f"{word} made no zeros"
    else:
        assert after.numbers < before.numbers or shared, f"{word} took nothing"


def arguments(word: str, model: nn.Module) -> dict:
    """What a pass is asked for; models without a head are scored by their hidden states."""
    given = PASSES[word]
    with torch.no_grad():
        predicted = has_logits(model(**sample_inputs(model)))
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


def in_halves(model: nn.Module) -> nn.Module:
    """A model whose checkpoint holds bfloat16: what is no weight, as a table of positions, is what transformers makes."""
    if not isinstance(model, PreTrainedModel):
        return model.bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()


def packed(name: str, word: str, folder: Path) -> tuple[Program, Context] | Cell:
    """The program that the engine is to run as it came, or how it was refused."""
    model = table.model(name)
    if ENGINE[word] == torch.bfloat16:
        model = in_halves(model)
    try:
        return capture(model), context(model, folder, name)
    except Reject as reject:
        return refusal(reject)


def emitted(program: Program, ctx: Context, into: Path, engine: bool = False) -> Cell:
    into.mkdir(parents=True)
    if engine:
        try:
            Native(path="x").emit(program, into, ctx)
        except Reject as reject:
            return refusal(reject)
        return GREEN
    word = "hf" if isinstance(program.model, PreTrainedModel) else "pt2"
    args = {"path": "x", "form": "auto", "shard": Bytes(5 * 10**9)} if word == "hf" else {"path": "x"}
    try:
        ctx.registry.make("target", Invocation(word, args)).emit(program, into, ctx)
    except Reject as reject:
        return refusal(reject)
    return GREEN
