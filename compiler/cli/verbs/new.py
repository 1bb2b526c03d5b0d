"""`effc new`: a recipe for a model and a goal, which checks."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ....dsl.checker.recipe import Invocation
from ....dsl.checker.value_text import quoted
from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ....dsl.syntax.format import format_source
from ....dsl.syntax.source import Source
from ...core.events import silent
from .flags import SharedFlags, make_verb
from .options import argument, option

if TYPE_CHECKING:
    from ....dsl.checker.skeleton import Skeleton
    from ...driver.api import Session
    from ...models.checkpoints.origin import Origin

file_exists = Fault("file-exists", "A file that a command should write is there already.", exit="usage")
unknown_goal = Fault("unknown-goal", "`effc new --goal` has no such goal.", exit="usage")
nothing_fits = Fault(
    "nothing-fits",
    "No step that `effc new` knows fits the model.\n\n"
    "`effc inspect MODEL` shows what effc finds in it, `effc passes` what there is to do.",
    exit="environment",
)

Goal = tuple[str, tuple[str, ...], tuple[str, ...], str, str]

_FILES = {".gguf": "gguf", ".json": "config"}  # by what their names end in
HF = 'hf("{path}")'
SEARCH = """light = prune.multi(remove: 5% of params, group: 32, score: perplexity(text.calib))
  small = prune.multi(remove: 8% of params, group: 32, score: perplexity(text.calib))
  both = search.front(points: [light, small], measure: [perplexity(text.heldout), params])"""
FEDERATION = 'flower("{path}", data: text.calib, clients: 4, rounds: 4, hold: 25%, steps: 8)'
GUIDE = 'rttc("{path}", knowledge: "{knowledge}", policy: ttt, count: 32)'

OPEN = "best = search.steps(optimize: {}, data: text.calib, choose: text.choose, train: text.train, within: 30min)"
NATIVE = 'native("{path}")'

# goal -> sentence, steps, bounds, name of the pipeline, target; steps and bounds as a model of text has them.
# A step or bound that the model or this effc has no use for is left out.
GOALS: dict[str, Goal] = {
    "smaller": (
        "Make {model} smaller: branches, MLP channels and heads compete for what goes.",
        ("slim = prune.multi(remove: 15% of params, group: 32, score: perplexity(text.calib))",),
        ("params              <= 0.86 * base", "perplexity(text.heldout) <= 2.00 * base"),
        "small",
        HF,
    ),
    "faster": (
        "Make {model} answer faster: the residual branches that are missed least go whole.",
        ("slim = prune.blocks(remove: {branches}, score: perplexity(text.calib))",),
        ("decode.p50          <= 1.00 * base", "perplexity(text.heldout) <= 3.00 * base"),
        "fast",
        HF,
    ),
    "gentle": (
        "Take a little off {model} and keep nearly all of its quality.",
        ("slim = prune.blocks(remove: 1, score: perplexity(text.calib))",),
        ("params              <= 0.99 * base", "perplexity(text.heldout) <= 1.50 * base"),
        "light",
        HF,
    ),
    "search": (
        "Cut {model} at two depths, and keep both: `effc pick` takes the best that fits a budget.",
        (SEARCH,),
        ("perplexity(text.heldout) <= 1.50 * base in light", "params <= 0.93 * base in any"),
        "sizes",
        'front("{path}")',
    ),
    "federated": (
        "Prune {model} a little, then let four clients heal it together: their rows stay with them.",
        ("slim = prune.blocks(remove: 1, score: perplexity(text.calib))",),
        (),
        "together",
        FEDERATION,
    ),
    "rttc": (
        "Let {model} answer with training on the samples of a knowledge base that tell most about the query.",
        ("slim = prune.blocks(remove: 1, score: perplexity(text.calib))",),
        ("perplexity(text.heldout) <= 1.50 * base",),
        "guide",
        GUIDE,
    ),
}
# In place of GOALS for a language model that reads the texts that come with effc, which `effc tune` searches: sentence,
# what steps are to be best at, and how much perplexity may rise.
WISHES = {
    "smaller": ("Make {model} as small as it gets at 5 % more perplexity.", "bytes", "1.05"),
    "faster": ("Make {model} write as fast as it gets at 5 % more perplexity.", "decode.p50", "1.05"),
    "gentle": ("Make {model} smaller, and keep nearly all of its quality.", "bytes", "1.01"),
}
# What stands in a knowledge base until somebody writes a better one.
SAMPLES = """{"question": "What is the capital of France?", "answer": "Paris"}
{"question": "Which river runs through Cairo?", "answer": "the Nile"}
{"text": "The Andes are the longest range of mountains on land."}
"""

SHARES = (1, 2 / 3, 1 / 3, 1 / 8)  # of what a goal removes, until a plan of it can be carried out
_OF_TEXT = ("federated", "rttc")  # goals whose target reads and writes text

_model = argument(
    "[MODEL]",
    "zoo:NAME, a model folder, ORG/NAME, a .gguf file, a config.json or FILE.py:FUNCTION; zoo:tiny-llama unless given.",
)
_goal = option("What the recipe is for.", "--goal", metavar="|".join(GOALS), show_default=True)
_output = option("Where to write it; named after model and goal unless given.", "-o", "--output", metavar="FILE")


def register(app: typer.Typer) -> None:
    @make_verb(app, flag_panels=("cache", "machine"))
    def new(
        shared: SharedFlags,
        model: Annotated[str, _model] = "zoo:tiny-llama",
        goal: Annotated[str, _goal] = "smaller",
        output: Annotated[Path | None, _output] = None,
    ) -> None:
        """Write a recipe that checks, for a model and a goal."""
        if goal not in GOALS:
            raise unknown_goal(f"`{goal}` is no goal", help=f"goals are {', '.join(GOALS)}").rejection()
        beside = output.parent if output else Path()
        source = source_expression(model, beside)
        short = re.sub(r"[^A-Za-z0-9]+", "-", display_name(model)).strip("-").lower()
        path = output or Path(f"{short or 'model'}-{goal}.effspec")
        if path.exists():
            raise file_exists(f"{path} exists", help="name another file with -o").rejection()
        from ...core.cache import write_atomic

        base = path.parent / _knowledge_file_name(short or "model")
        is_new_base = goal == "rttc" and not base.exists()
        if is_new_base:  # before the recipe, whose plan reads it
            write_atomic(base, SAMPLES.encode())
        try:
            text = make_checked_recipe(source, goal, short or "model", path, shared)
        except BaseException:
            if is_new_base:
                base.unlink()
            raise
        write_atomic(path, text.encode())
        if is_new_base:
            shared.screen.note(f"{base} holds three samples: put yours there")
        if shared.format == "json":
            return shared.screen.answer_json("new", path=str(path), goal=goal, model=source.text)
        shared.screen.answer(str(path))
        name = quote(str(path))
        is_open = OPEN.partition("(")[0] in text
        return shared.screen.note(
            f"next: effc tune {name}" if is_open else f"next: effc plan {name}, then effc compile {name}"
        )


@dataclass(frozen=True)
class NamedSource:
    """Source expression of a model: `zoo("tiny-llama")`, `hf("./x")`, `hf("org/name")`, `gguf("./x.gguf")`."""

    word: str
    name: str

    @property
    def text(self) -> str:
        return f"{self.word}({quoted(self.name)})"

    def call(self, session) -> Invocation:
        params = session.registry.vocabulary.word("model", self.word).params
        first = next(p.name for p in params if p.positional)
        return Invocation(self.word, {**{p.name: p.default for p in params}, first: self.name})


def source_expression(model: str, recipe_folder: Path) -> NamedSource:
    """Source expression, in a recipe in the folder `recipe_folder`, for a model of the command line."""
    kind, colon, name = model.partition(":")
    if colon and kind in ("zoo", "hf"):
        return NamedSource(kind, name)
    if Path(model).is_dir():
        return NamedSource("hf", _folder_relative_to_recipe(Path(model), recipe_folder))
    if Path(model).is_file() and Path(model).suffix in _FILES:
        return NamedSource(_FILES[Path(model).suffix], _folder_relative_to_recipe(Path(model), recipe_folder))
    file, _, function = model.rpartition(":")
    if file.endswith(".py") and Path(file).is_file():
        return NamedSource("module", f"{_folder_relative_to_recipe(Path(file), recipe_folder)}:{function}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return NamedSource("hf", model)
    from ...driver.models import unknown_location_diagnostic

    raise unknown_location_diagnostic(model).rejection()


@dataclass(frozen=True)
class Judge:
    """Score of a recipe, and the rows it reads.

    lines    that declare the rows
    metric   perplexity of a model that predicts tokens, similarity of what else there is
    calib    the rows that passes read, `heldout` those of bounds, `choose` those that open steps are chosen by
    train    rows to heal on, "" where there are none
    by       of a similarity, how states are compared where theirs may become narrower
    """

    lines: tuple[str, ...]
    metric: str
    calib: str
    heldout: str
    choose: str
    train: str = ""
    by: str = ""

    def adapt_line(self, line: str) -> str:
        """A step or a bound of `GOALS` for this model."""
        line = line.replace("text.calib", self.calib).replace("text.heldout", self.heldout)
        if self.metric == "similarity":
            line = re.sub(r"(perplexity\(\S+\) )<= [\d.]+ \* base", r"\1>= 0.80", line)
        return re.sub(r"perplexity\((\w+(?:\.\w+)?)\)", lambda match: self.metric_on_rows(match[1]), line)

    def metric_on_rows(self, data_name: str) -> str:
        """The metric of a set of rows, as a recipe writes it."""
        return f"{self.metric}({data_name}{self.by})"


_TEXTS = ("# Texts that come with effc; text of your own domain says more.", "use std.text")
LONGEST = 256  # tokens of a row of the texts that come with effc
_RANDOM_DATA_NOTE = (
    "# Random rows show that it works; rows of your own say what it does: `effc explain data`.",
    "data calib = synthetic(count: 16{long}, seed: 1)",
    "data heldout = synthetic(count: 16{long}, seed: 2)",
    "data choose = synthetic(count: 16{long}, seed: 3)",
)


def choose_evaluation(origin: "Origin", skeleton: "Skeleton") -> Judge:
    """Text for what has a tokenizer; random rows for images, sounds, series and whatever a module takes."""
    from ...models.rows.inputs import is_encoder_decoder_config, reads_tokens

    words, max_positions = skeleton.facts.get("vocab"), origin.positions or LONGEST
    reads = bool(words and origin.tokenizer_identity and max_positions >= LONGEST and reads_tokens(origin.config))
    is_language = skeleton.facts.get("causal_lm") or (reads and is_encoder_decoder_config(origin.config))
    metric = "perplexity" if is_language else "similarity"
    if reads:
        return Judge(_TEXTS, metric, "text.calib", "text.heldout", "text.choose", "text.train")
    long = f", length: {max_positions}" if max_positions < 128 else ""  # tokens of a row, unless said
    lines = tuple(line.format(long=long) for line in _RANDOM_DATA_NOTE)
    has_narrow_states = not (origin.code or origin.token_id_count or skeleton.stream)
    by = ", by: cka" if has_narrow_states and metric == "similarity" else ""
    return Judge(lines, metric, "calib", "heldout", "choose", by=by)


def display_name(model: str) -> str:
    """Display name of a model: the name of its folder or file, of a config's the folder that it lies in."""
    path = Path(model).resolve()
    if path.is_file():
        return path.parent.name if path.name == "config.json" else path.stem
    return path.name if path.is_dir() else re.split("[/:]", model)[-1]


def _folder_relative_to_recipe(folder: Path, recipe_path: Path) -> str:
    """A folder as seen from a recipe: relative where both lie in the working folder, or close to it."""
    steps = Path(os.path.relpath(folder.resolve(), recipe_path.resolve())).as_posix()
    if steps.startswith("../../.."):
        return folder.resolve().as_posix()
    return steps if steps.startswith(".") else f"./{steps}"


def make_checked_recipe(source: NamedSource, goal: str, model_name: str, path: Path, shared: SharedFlags) -> str:
    """The recipe with every step and bound that checks for this model."""
    session = shared.session(path)
    call = source.call(session)
    skeleton = session.skeleton(call)
    judge = choose_evaluation(session.resolve_model_origin(call), skeleton)
    if goal in _OF_TEXT and judge.lines is not _TEXTS:
        message = f"the goal `{goal}` is of models that read text by a tokenizer, and {source.text} has none"
        raise nothing_fits(
            message, help=f"goals for it are {', '.join(g for g in GOALS if g not in _OF_TEXT)}"
        ).rejection()
    if goal in WISHES and judge.lines is _TEXTS and skeleton.facts.get("causal_lm"):
        sentence, metric, limit = WISHES[goal]
        limits = (f"perplexity(text.heldout) <= {limit} * base",)
        wish = (sentence, (OPEN.format(metric),), limits, GOALS[goal][3], NATIVE)
        text = _render_recipe(source.text, wish, model_name, judge, *wish[1:3])
        fixed = _render_recipe(source.text, wish, model_name, judge, (), limits)  # the target alone
        if not _check_errors(text, path, session) and not _plan_diagnostics(fixed, path, session):
            return format_source(Source(str(path), text))
    branches = max(1, (len(skeleton.branches) - len(skeleton.stays)) // 10)  # about a tenth of them
    forms, bounds = (tuple(judge.adapt_line(line) for line in lines) for lines in GOALS[goal][1:3])
    steps = tuple(s.format(branches=branches) for s in forms)
    if not skeleton.facts.get("causal_lm"):
        bounds = tuple(b for b in bounds if not b.startswith("decode"))

    def draft(steps: tuple[str, ...], bounds: tuple[str, ...]) -> str:
        return _render_recipe(source.text, GOALS[goal], model_name, judge, steps, bounds)

    reason: list[Diagnostic] = []
    for share in SHARES:
        smaller, looser = (tuple(_scale_removed_share(line, share) for line in lines) for lines in (steps, bounds))
        fit: tuple[str, ...] = ()
        for step in smaller:
            fit += () if _check_errors(draft((*fit, step), ()), path, session) else (step,)
        chosen: tuple[str, ...] = ()
        for bound in looser if fit else ():
            chosen += () if _check_errors(draft(fit, (*chosen, bound)), path, session) else (bound,)
        text = draft(fit, chosen)
        reason = _plan_diagnostics(text, path, session) if fit else _check_errors(draft(smaller[:1], ()), path, session)
        if not reason:
            return format_source(Source(str(path), text))
        if all(d.slug != "out-of-reach" for d in reason):
            break
    message = "; ".join(" ".join(filter(None, (f"{d.message};", d.note))).rstrip(";") for d in reason)
    raise nothing_fits(
        f"no step for the goal `{goal}` fits {source.text}: {message}",
        help="`effc inspect` shows what is in it; try another --goal",
    ).rejection()


def _scale_removed_share(line: str, factor: float) -> str:
    """A step that removes that share of what it removes, and a bound on parameters as much looser."""
    line = re.sub(r"(\d+)% of params", lambda match: f"{max(1, round(factor * int(match[1])))}% of params", line)
    return re.sub(
        r"(params +<=) ([\d.]+)", lambda match: f"{match[1]} {min(1, 1 - factor * (1 - float(match[2]))):.3g}", line
    )


def _plan_diagnostics(text: str, path: Path, session: "Session") -> list[Diagnostic]:
    """Diagnostics of `effc plan` for a text, as the file that it will be."""
    from ...driver import api

    draft = replace(session, texts={path.resolve(): text}, settings=replace(session.settings, on_event=silent))
    try:
        api.plan_all_pipelines(draft)
    except Reject as rejection:
        return list(rejection.diagnostics)
    return []


def _check_errors(text: str, path: Path, session: "Session") -> list[Diagnostic]:
    """Errors of a text, checked as the file it will be."""
    from ....dsl.checker.check import check_recipe_file
    from ....dsl.syntax.parse import parse

    parsed = parse(Source(str(path), text))
    assert not parsed.diagnostics, f"a recipe of ours does not parse: {parsed.diagnostics}"
    checked = check_recipe_file(
        parsed.file,
        session.registry.vocabulary,
        find_skeleton=session.skeleton,
        read_module=session.read_library_module,
    )
    return [d for d in checked.diagnostics if d.severity == "error"]


def _render_recipe(
    call: str, goal: Goal, model_name: str, judge: Judge, steps: tuple[str, ...], bounds: tuple[str, ...]
) -> str:
    sentence, _, _, name, target = goal
    doc = sentence.format(model=model_name)
    used = judge.lines
    if judge.lines is not _TEXTS:
        read = " ".join((*steps, *bounds))
        used = tuple(line for line in judge.lines if line.startswith("#") or re.search(rf"\({line.split()[1]}\b", read))
    model = f"model base = {call}"
    lines = [
        "effspec 1",
        f'"""{doc}"""',
        "",
        *([*used, "", model] if used[-1].startswith("use") else [model, "", *used]),
    ]
    lines += ["", f"pipeline {name}(base) {{", *(f"  {s}" for s in steps), "}", ""]
    if bounds:
        lines += [f"expect {name} {{", *(f"  {b}" for b in bounds), "}", ""]
    emitted = target.format(path=f"{model_name}-{name}", knowledge=_knowledge_file_name(model_name))
    return "\n".join([*lines, f"emit {name} {{ {emitted} }}", ""])


def _knowledge_file_name(model_name: str) -> str:
    return f"{model_name}-knowledge.jsonl"
