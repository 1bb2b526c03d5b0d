"""`effc tune`: searches steps for a wish, and compiles the recipe that comes out."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ....dsl.checker.value_text import quoted
from ....dsl.checker.vocabulary import Vocabulary
from ....dsl.syntax.diagnostics import Diagnostic, Reject
from ....dsl.syntax.source import Source
from ...core.quantity import duration_text, size_text
from .compile import artifact_summary_text, manifest_summary_json
from .flags import SharedFlags, make_verb, pipeline_option
from .new import Judge, choose_evaluation, display_name, source_expression
from .option_spans import OptionText, located_in_options
from .options import argument, option
from .output import exit_code_of

if TYPE_CHECKING:
    from ...driver.api import Session
    from ...driver.tuning.journal import Journal
    from ...driver.tuning.tune import Tuned
    from ...driver.tuning.wish import Wish
    from ...models.checkpoints.origin import Origin

PIPELINE = "tuned"
LENGTH, ROWS = 256, 32  # of a row of own text in tokens, and of a data set in rows
LONGEST_TEXT = 20_000_000  # characters of own text that are read
COMMAND_LINE = Path("command-line")  # name of a recipe that stands in no file, in diagnostics
_subject = argument("RECIPE|MODEL", "A recipe with open steps, or a model as `effc new` takes it.")
_out = option("Where the artifact goes.", "-o", "--output", metavar="FOLDER", show_default=True)
_force = option("Replace what exists.", "--force")
_for = option("Of a model: the target.", "--for", metavar="TARGET", show_default=True)
_optimize = option("Of a model: the metric to be best at.", "--optimize", metavar="METRIC", show_default=True)
_against = option("Of a model: a second metric; the front between both is compiled.", "--against", metavar="METRIC")
_expect = option('Of a model: a bound, such as "perplexity <= 1.02 * base"; repeatable.', "--expect", metavar="BOUND")
_within = option("Of a model: time for the search.", "--within", metavar="TIME", show_default=True)
_data = option(
    "Of a model: text of yours; it is cut into rows to calibrate, to choose and to judge by.", "--data", metavar="FILE"
)
_candidate = option(
    'Compile this candidate, as the summary names it ("int8, inputs int16"), instead of the best.',
    "--candidate",
    metavar="NAME",
)
_explain = option("Say what would be tried, in which order and for how long.", "--explain")


@dataclass(frozen=True)
class WishOptions:
    """Options that say a wish for a model without a recipe."""

    target: str = "native"
    optimize: str = "decode.p50"
    against: str = ""
    expect: tuple[str, ...] = ()
    within: str = "30min"
    data: Path | None = None


def register(app: typer.Typer) -> None:
    @make_verb(app, flag_panels=("inputs", "cache", "machine", "progress", "gate"))
    def tune(
        subject: Annotated[str, _subject],
        shared: SharedFlags,
        output: Annotated[Path, _out] = Path("out"),
        force: Annotated[bool, _force] = False,
        target: Annotated[str, _for] = WishOptions.target,
        optimize: Annotated[str, _optimize] = WishOptions.optimize,
        against: Annotated[str, _against] = WishOptions.against,
        expect: Annotated[list[str], _expect] = (),  # type: ignore[assignment]
        within: Annotated[str, _within] = WishOptions.within,
        data: Annotated[Path | None, _data] = None,
        candidate: Annotated[str, _candidate] = "",
        pipeline: Annotated[list[str], pipeline_option] = (),  # type: ignore[assignment]
        explain: Annotated[bool, _explain] = False,
    ) -> int:
        """Search the steps that keep all bounds and are best at one metric, or the front of two, and compile them.

        Goes on where it was stopped. Writes the recipe that it chose, which compiles by itself."""
        shared.require_environment()
        from ...artifacts.artifact import refuse_output_path
        from ...core.cache import Cache
        from ...driver.tuning.journal import Journal
        from ...driver.tuning.tune import tune as search_steps
        from ...driver.tuning.wish import read_wish

        with shared.listening() as listener:
            options = WishOptions(target, optimize, against, tuple(expect), within, data)
            if subject.endswith(".effspec"):
                refuse_options_of_a_model(options)
                wish_recipe = WishRecipe(shared.session(Path(subject), listener, pipeline), Path(subject))
            else:
                if pipeline:
                    raise typer.BadParameter("--pipeline is for a recipe, and this is a model")
                require_one_value_each(target, optimize, within, *filter(None, [against]), *expect)
                wish_recipe = make_wish_recipe(subject, options, shared, listener)
            with wish_recipe.naming_options():
                wish = read_wish(wish_recipe.session)
                if explain:
                    return print_preview(wish, candidate, shared)
                journal = Journal.read_or_make(wish, Cache(wish_recipe.session.settings.cache_dir))
                page = wish_recipe.result.with_suffix(".html")
                if page.is_file():  # a page that can't be written at all is a note in the end
                    refuse_output_path(page, force or journal.has_recorded_file(page), True)
                tuned = search_steps(wish, wish_recipe.result, output, force=force, name=candidate)
            tuned.unmet = wish_recipe.located(tuned.unmet)
            problem = _write_page_or_explain(tuned, page, journal) if tuned.compiled else ""
        code = print_tuned(tuned, shared)
        if problem:
            shared.screen.note(f"no page was written: {problem}")
        return code


def _write_page_or_explain(tuned: "Tuned", page: Path, journal: "Journal") -> str:
    """Write the page of a search; a sentence where it can't be: the artifact is there, and worth its summary."""
    from ...driver.tuning.page import write_html_page

    try:
        write_html_page(tuned, page)
        journal.note_written(page.read_text(encoding="utf-8"))
    except (Reject, OSError) as error:
        diagnostics = error.diagnostics if isinstance(error, Reject) else ()
        return "; ".join(f"{d.message}; {d.help}" for d in diagnostics) or str(error)
    return ""


def refuse_options_of_a_model(options: WishOptions) -> None:
    """Refuse options of a wish for a model beside a recipe, which says all that itself."""
    names = [f.name for f in fields(options) if getattr(options, f.name) != f.default]
    if names:
        flags = ", ".join(f"--{'for' if name == 'target' else name}" for name in names)
        raise typer.BadParameter(f"{flags}: a recipe says that itself; write it there")


def require_one_value_each(*texts: str) -> None:
    """Refuse options that would be no, or more than one, metric, bound, time or target in a recipe."""
    for text in texts:
        if set(text) & set("{}"):
            raise typer.BadParameter(f"`{text:.60}` holds more than one thing")
        if not text.strip():
            raise typer.BadParameter("an option of the wish is empty: leave it out")


@dataclass(frozen=True)
class WishRecipe:
    """Recipe of a wish.

    path      of the recipe, by which the one that comes out is named
    options   places of options in a recipe that was written from them
    """

    session: "Session"
    path: Path
    source: Source | None = None
    options: Sequence[OptionText] = ()

    @property
    def result(self) -> Path:
        """The recipe that comes out."""
        return self.path.with_name("-".join([self.path.stem, *self.session.pipelines, "tuned"]) + ".effspec")

    def located(self, diagnostics: Sequence[Diagnostic]) -> list[Diagnostic]:
        """Diagnostics with places that a user knows."""
        return located_in_options(diagnostics, self.source, self.options) if self.source else list(diagnostics)

    @contextmanager
    def naming_options(self) -> Iterator[None]:
        """Raise a Reject again with places that a user knows."""
        try:
            yield
        except Reject as rejection:
            raise Reject(*self.located(rejection.diagnostics)) from rejection


def make_wish_recipe(model: str, options: WishOptions, shared: SharedFlags, listener: Any) -> WishRecipe:
    """Session of a recipe with open steps that stands in no file."""
    beside = Path()
    expression = source_expression(model, beside)
    name = re.sub(r"[^A-Za-z0-9]+", "-", display_name(model)).strip("-").lower() or "model"
    session = shared.session(COMMAND_LINE, listener)
    call = expression.call(session)
    judge = choose_evaluation(session.resolve_model_origin(call), session.skeleton(call))
    if options.data is not None:
        judge = split_text_into_data_sets(options.data, judge, session.resolve_model_origin(call))
    text = wish_recipe_text(expression.text, name, judge, options, session.registry.vocabulary)
    texts = locate_options_in_recipe(text, options, judge, session.registry.vocabulary)
    source = Source(str(COMMAND_LINE), text)
    return WishRecipe(replace(session, texts={COMMAND_LINE.resolve(): text}), Path(f"{name}.effspec"), source, texts)


def wish_recipe_text(
    model_expression: str, model_name: str, judge: Judge, options: WishOptions, vocabulary: Vocabulary
) -> str:
    """Recipe of a wish."""
    model, bounds = (
        f"model base = {model_expression}",
        [with_data_argument(b, judge.heldout, vocabulary) for b in options.expect],
    )
    optimize = f"optimize: {with_data_argument(options.optimize, judge.choose, vocabulary)}, "
    if options.against:
        optimize += f"against: {with_data_argument(options.against, judge.choose, vocabulary)}, "
    train = f"train: {judge.train}, " if judge.train else ""
    step = (
        f"best = search.steps({optimize}data: {judge.calib}, choose: {judge.choose}, {train}within: {options.within})"
    )
    lines = ["effspec 1", f'"""The best of {model_name} for {options.target}, found by `effc tune`."""', ""]
    read = " ".join([step, *bounds])
    used = [line for line in judge.lines if not line.startswith("data ") or re.search(rf"\b{line.split()[1]}\b", read)]
    lines += [*used, "", model] if used[-1].startswith("use") else [model, "", *used]
    lines += ["", f"pipeline {PIPELINE}(base) {{", f"  {step}", "}"]
    if bounds:
        lines += ["", f"expect {PIPELINE} {{", *bounds, "}"]
    lines += ["", f'emit {PIPELINE} {{ {options.target}("{model_name}-{options.target}") }}', ""]
    return "\n".join(lines)


def with_data_argument(text: str, data_name: str, vocabulary: Vocabulary) -> str:
    """A metric or bound with rows to measure on, where its metric needs some and none are wish_recipe."""
    at = end_offset_of_dataless_metric(text, vocabulary)
    return f"{text[:at]}({data_name}){text[at:]}" if at else text


def end_offset_of_dataless_metric(text: str, vocabulary: Vocabulary) -> int:
    """Offset behind the name of a metric that needs rows and has none written; 0 of other texts."""
    match = re.match(r"\s*([A-Za-z_][\w.]*)", text)
    word = vocabulary.word("metric", match[1]) if match else None
    if match is None or word is None or text[match.end() :].lstrip().startswith("("):
        return 0
    return match.end() if any(p.name == "data" and p.required for p in word.params) else 0


def locate_options_in_recipe(
    recipe_text: str, options: WishOptions, judge: Judge, vocabulary: Vocabulary
) -> list[OptionText]:
    """Places of the options in the recipe that `wish_recipe_text` wrote from them."""
    texts: list[OptionText] = []

    def add(option: str, text: str, rows: str, before: str) -> None:
        with_data = with_data_argument(text, rows, vocabulary) if rows else text
        behind = texts[-1].start if texts else 0
        start = recipe_text.index(before + with_data, behind) + len(before)
        texts.append(
            OptionText(option, text, start, end_offset_of_dataless_metric(text, vocabulary), len(with_data) - len(text))
        )

    add("--optimize", options.optimize, judge.choose, "search.steps(optimize: ")
    if options.against:
        add("--against", options.against, judge.choose, "against: ")
    add("--within", options.within, "", "within: ")
    for bound in options.expect:
        add("--expect", bound, judge.heldout, "\n")
    add("--for", options.target, "", f"emit {PIPELINE} {{ ")
    return texts


def split_text_into_data_sets(file: Path, judge: Judge, origin: "Origin") -> Judge:
    """Data sets of one text file, without a row in common; one to heal on if it is long enough.

    Raises Reject (too-short) for a text of fewer rows than three data sets have.
    """
    from ...inputs.windows import encode, find_files, read_text, too_short

    paths = find_files(str(file), Path(), relative_to="the current folder")
    tokenizer = origin.tokenizer()
    sets = {"calib": (0, ROWS), "choose": (ROWS, ROWS), "heldout": (2 * ROWS, ROWS)}
    if tokenizer is not None:
        tokens = len(encode("".join(map(read_text, paths))[:LONGEST_TEXT], tokenizer))
        needed = 3 * ROWS * LENGTH
        if tokens < needed:
            message = f"{file} has {tokens} tokens, and a search of steps needs {needed}: three sets of {ROWS} rows"
            raise too_short(message, help="take a longer text, or leave `--data` out").rejection()
        if (left := (tokens - needed) // LENGTH) >= 64:
            sets["train"] = (3 * ROWS, min(left, 512))
    rows = f"text({quoted(file.as_posix())}, samples: {{}}, skip: {{}}, length: {LENGTH}, seed: 7)"
    lines = tuple(f"data {name} = {rows.format(count, skip)}" for name, (skip, count) in sets.items())
    return replace(judge, lines=lines, **{"train": "", **{name: name for name in sets}})


def print_preview(wish: "Wish", candidate: str, shared: SharedFlags) -> int:
    """Candidates of one change in the order in which they are tried, with their planned time and size."""
    from ...driver.tuning.preview import planned_changes_and_num_combinations

    changes, combined = planned_changes_and_num_combinations(wish, candidate)
    if shared.format == "json":
        shared.screen.answer_json("tune", preview=[asdict(change) for change in changes], combinations=combined)
        return 0
    table = [
        ("change", "steps and arguments", "time", "on disk"),
        *(
            (
                c.name,
                c.steps,
                *(("refused", c.refused) if c.refused else (duration_text(c.seconds), size_text(c.disk_bytes))),
            )
            for c in changes
        ),
    ]
    if not candidate:
        table += [("combinations", f"the best predicted of {combined}", "the rest", "")]
    shared.screen.answer(shared.screen.table(table, right=(2, 3)))
    return 0


def print_tuned(tuned: "Tuned", shared: SharedFlags) -> int:
    """Table of the artifact, then of the candidates; the exit code."""
    from ...driver.tuning.summary import (
        indistinguishable_finalists_text,
        measured_twice_text,
        metric_names,
        reason_of_unmeasured,
        table_rows,
        to_json,
        trade_off_sentences,
    )

    screen = shared.screen
    if screen.format == "json":
        artifacts = [
            {"candidate": candidate.name, "path": str(a.path), **manifest_summary_json(a.manifest)}
            for candidate, compiled in tuned.chosen.items()
            for result in compiled.results
            for a in result.artifacts
        ]
        screen.complain(tuned.unmet, "tune", **to_json(tuned), artifacts=artifacts)
        return exit_code_of(tuned.unmet)
    for compiled in tuned.chosen.values():
        for artifact in (a for result in compiled.results for a in result.artifacts):
            screen.answer(artifact_summary_text(artifact.path, artifact.manifest, screen) + "\n")
    if sentence := measured_twice_text(tuned):
        screen.answer(sentence)
    head = ("candidate", *metric_names(tuned.search), "")
    width = len(head) - 2
    table = [head, *((r.name, *(r.cells or ("",) * width), r.state) for r in table_rows(tuned))]
    screen.answer(screen.table(table, right=tuple(range(1, width + 1)), indent="  "))
    for sentence in filter(None, (*trade_off_sentences(tuned), indistinguishable_finalists_text(tuned))):
        screen.answer(sentence)
    screen.complain(tuned.unmet, "tune")
    if not tuned.unmet:
        search = tuned.search
        spent = f"{len(search.candidates)} candidates measured in {duration_text(search.seconds)}"
        screen.note(f"{search.measured_count} of {spent}; {reason_of_unmeasured(search)}")
        for compiled in tuned.chosen.values():
            screen.note(f"recipe: {compiled.recipe}")
    return exit_code_of(tuned.unmet)
