"""Steps of a pipeline, in order, those of called modules included."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..syntax import ast
from ..syntax.diagnostics import Diagnostic, Fault
from ..syntax.source import Span
from .calls import check_plugin_call_with_recovery
from .modules import instantiate_module, module_call_arguments
from .recipe import Invocation
from .rules import Rules
from .scope import Scope, ScopeEntry
from .typed import kind_mismatch_diagnostic, type_mismatch
from .values import StepRef, references_in
from .vocabulary import Word

wrong_order = Fault("wrong-order", "Two passes stand in an order in which the later one undoes or hinders the other.")
unused_step = Fault("unused-step", "A step's result is neither followed, nor emitted, nor named anywhere.")


@dataclass(frozen=True)
class Stage:
    """A step under construction.

    word, call    None where no such word is; `call` has the arguments without faults where it is not `sound`
    caller        the recipe's own step where this one came with a module's pipeline
    """

    name: str
    source: str
    span: Span
    word: Word | None = None
    call: Invocation | None = None
    caller: Span | None = None
    sound: bool = False
    origin: Span | None = None  # what it wrote after `from:`

    @property
    def rules(self) -> Rules:
        return self.word.rules(self.call.args) if self.word and self.call else Rules()


@dataclass
class PipelineBuild:
    """The steps of one pipeline. `input` is the model's name; `scope` has the steps' names."""

    input: str
    scope: Scope
    stages: list[Stage] = field(default_factory=list)

    def source_chain_of(self, name: str) -> list[Stage]:
        """The stages that a step's result went through, first to last, its own included."""
        by_name = {s.name: s for s in self.stages}
        out: list[Stage] = []
        while name in by_name and by_name[name] not in out:
            out.append(by_name[name])
            name = by_name[name].source
        return out[::-1]

    def report(self, stage: Stage, fault: Diagnostic) -> None:
        """Report a fault of a step; one in a module's file shows who called it."""
        called = ((stage.caller, "called here"),) if stage.caller else ()
        self.scope.report(replace(fault, related=(*fault.related, *called)))


def read_pipeline(pipeline: ast.Pipeline, scope: Scope) -> PipelineBuild | None:
    """The line of a pipeline of the recipe itself; None where its model is unknown."""
    model = _model_entry_of_pipeline(pipeline, scope)
    line = PipelineBuild(
        model.name if model else "", scope.make_inner_scope({s.name.path: s.name.span for s in pipeline.steps})
    )
    _append_steps(pipeline, line.scope, line, line.input, "")
    _report_wrong_pass_order(line)
    return line if model else None


def _model_entry_of_pipeline(pipeline: ast.Pipeline, scope: Scope) -> ScopeEntry | None:
    name = pipeline.model
    entry = scope.resolve_name(name.path)
    if entry is None:
        scope.report_unknown_name(name, ("model",), noun="model")
    elif entry.kind != "model":
        scope.report(kind_mismatch_diagnostic(name, entry, ", a pipeline starts from a model"))
        entry = None
    else:
        scope.variant.add_module_entry(entry)
    return entry


def _append_steps(
    pipeline: ast.Pipeline, scope: Scope, build: PipelineBuild, source: str, prefix: str, caller: Span | None = None
) -> str:
    """Add a pipeline's steps to the line, starting from `source`; the name of the last result."""
    start = source
    for step in pipeline.steps:
        chosen = _from_argument_input(step, scope, pipeline, start)
        source = source if chosen is None else chosen
        name, path = prefix + step.name.path, step.call.name.path
        if (callee := _module_pipeline(path, scope)) is not None:
            result = _inline_module_pipeline(step, callee, scope, build, source, name, caller or step.span)
        else:
            word, call, sound = check_plugin_call_with_recovery("pass", step.call, scope)
            build.stages.append(Stage(name, source, step.span, word, call, caller, sound, _from_argument_span(step)))
            result = name
        scope.later.pop(step.name.path, None)
        scope.declare(step.name, ScopeEntry("step", result, step.name.span))
        source = result
    return source


def _from_argument_span(step: ast.Step) -> Span | None:
    return next((a.value.span for a in step.call.args if a.name == "from"), None)


def _from_argument_input(step: ast.Step, scope: Scope, pipeline: ast.Pipeline, start: str) -> str | None:
    """Input that `from:` names: the pipeline's model or an earlier step; None without `from:`."""
    arg = next((a for a in step.call.args if a.name == "from"), None)
    return resolve_from_argument(arg, scope, pipeline, start) if arg else None


def resolve_from_argument(arg: ast.Arg, scope: Scope, pipeline: ast.Pipeline, start: str) -> str | None:
    """The result that a `from:` names, or None with a fault reported."""
    value = arg.value
    if not isinstance(value, ast.Name):
        scope.report(
            type_mismatch(
                "`from` names a step or the pipeline's model",
                value.span,
                help=f"write `from: {pipeline.model.path}`, or the name of an earlier step",
            )
        )
        return None
    if value.path == pipeline.model.path:
        return start
    entry = scope.resolve_name(value.path)
    if entry is None:
        scope.report_unknown_name(value, ("step",), (pipeline.model.path,), "step")
        return None
    if entry.kind != "step":
        scope.report(
            kind_mismatch_diagnostic(value, entry, f"; `from` names an earlier step or `{pipeline.model.path}`")
        )
        return None
    return entry.name


def _module_pipeline(path: str, scope: Scope) -> ScopeEntry | None:
    """The pipeline that `mine.slimming` names, where `mine` is a module that has it."""
    alias, dot, name = path.partition(".")
    module = scope.local_entry(alias) if dot else None
    if module is None or module.kind != "module" or module.scope is None:
        return None
    entry = module.scope.names.get(name)
    return entry if entry and entry.kind == "pipeline" else None


def _inline_module_pipeline(
    step: ast.Step, callee: ScopeEntry, scope: Scope, build: PipelineBuild, source: str, name: str, caller: Span
) -> str:
    """Add the steps of a module's pipeline under the step's name."""
    alias = step.call.name.path.partition(".")[0]
    module = scope.local_entry(alias)
    module.used = True
    arguments = module_call_arguments(step.call, module.node, scope)
    if arguments is None:
        build.stages.append(Stage(name, source, step.span))
        return name
    opened = instantiate_module(module.node, _file_scope(scope), alias, arguments, name)
    pipeline = callee.node
    inner = opened.make_inner_scope({s.name.path: s.name.span for s in pipeline.steps})
    model = opened.resolve_name(pipeline.model.path)
    if model is None:
        opened.report_unknown_name(pipeline.model, ("model",), noun="model")
    kind = "step" if any(s.name == source for s in build.stages) else "model"
    inner.names[pipeline.model.path] = ScopeEntry(kind, source, pipeline.model.span, None)
    return _append_steps(pipeline, inner, build, source, f"{name}.", caller)


def _file_scope(scope: Scope) -> Scope:
    return _file_scope(scope.parent) if scope.parent else scope


def _report_wrong_pass_order(build: PipelineBuild) -> None:
    """Headers say which pass must come later than which; each pair is looked for along every branch."""
    reported = set()
    for end in build.stages:
        before = build.source_chain_of(end.name)
        for i, early in enumerate(before):
            rules = early.word.facts.get("after", {}) if early.word else {}
            for late in before[i + 1 :]:
                reason = _reason_to_follow(late.word, rules) if late.word else None
                if reason is not None and (early.name, late.name) not in reported:
                    reported.add((early.name, late.name))
                    build.scope.report(
                        wrong_order(
                            f"`{early.name}` runs before `{late.name}`, but {early.word.name} must come after "
                            f"{late.word.name}",
                            early.span,
                            note=reason,
                            related=((late.span, "the one to run first"),),
                            help=f"move `{early.name}` down",
                        )
                    )


def _reason_to_follow(plugin: Word, rules: Mapping[str, str]) -> str | None:
    """Reason of the first rule that names a pass, or what it changes; None where there is none."""
    names = (plugin.name, *(f"changes: {part}" for part in plugin.facts.get("changes", ())))
    return next((rules[name] for name in names if name in rules), None)


def report_unused_steps(build: PipelineBuild, emitted: set[str]) -> None:
    """Report steps that nothing follows, names or emits; a module's own are the module's business."""
    used = {s.source for s in build.stages} | emitted | {s.name for s in build.stages[-1:]}
    for stage in build.stages:
        used |= {ref.name for ref in references_in(stage.call.args, StepRef)} if stage.call else set()
    for stage in build.stages:
        if stage.name not in used and "." not in stage.name:
            build.scope.report(
                unused_step(
                    f"nothing uses the result of `{stage.name}`",
                    stage.span,
                    help="drop the step, or name it in a `from:`",
                )
            )
