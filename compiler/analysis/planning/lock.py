"""Content of a lock: every fact that decides its artifacts, each with its place in the recipe.

Two folders with one lock give one artifact hash on processors with the same instructions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ....dsl.checker.profiles import MAX_THREADS
from ....dsl.checker.recipe import Invocation
from ....dsl.checker.value_text import value_text
from ....dsl.checker.values import DataRef, value_from_json
from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ....dsl.syntax.source import Span
from ...core.events import Warned
from ...core.fingerprint import machine_facts
from ...core.hashes import cached_file_hash
from ...core.safe_read import parse_strict_json
from ...core.sealed_json import canonical_json
from ...core.settings import Settings
from ...core.warned import other_level
from ...models.checkpoints.model_folder import TOKENIZER_FILES
from ...models.checkpoints.weights import read_weight_headers
from ...plugin import lockfile
from ...plugin.context import Context
from . import keys

if TYPE_CHECKING:
    from .plan import Plan

no_lock = Fault(
    "no-lock",
    "`--locked` was given, and no lock speaks of the recipe.\n\n`effc lock RECIPE` writes `effspec.lock` beside it.",
    exit="usage",
)
lock_drift = Fault(
    "lock-drift",
    "Something that decides the artifact is not as `effspec.lock` has it.\n\n"
    "The lock holds hashes of the model's files and of data, versions of passes and libraries, and every argument with "
    "its default. Where the change is meant, `effc lock RECIPE` writes the lock again.",
)
ISA = "machine isa"  # told, not refused: results differ by rounding
THREADS = "setting threads"
HELP = "if that is meant, write the lock again with `effc lock`"


@dataclass(frozen=True)
class Fact:
    """Line of a lock. `value` is what stands there where that is not the text: an argument, whose text is JSON."""

    text: str
    span: Span | None = None
    value: Any = None

    @property
    def stored(self) -> Any:
        return self.text if self.value is None or not lockfile.can_be_toml(self.value) else self.value

    def equals(self, locked_value: Any) -> bool:
        """Whether a lock has it: as a value of TOML, or as the JSON text that effc 0.2.0 wrote."""
        return locked_value == self.text or canonical_json(locked_value) == canonical_json(self.stored)


def lock_facts(plans: "Sequence[Plan]", contexts: Sequence[Context]) -> dict[str, Fact]:
    """Everything that decides what compiling gives, by what it is called in the lock, in a steady order."""
    result: dict[str, Fact] = {}
    for plan, ctx in zip(plans, contexts, strict=True):
        result |= dict(_setting_facts(ctx))
        before = f"[{plan.recipe.variant}] " if plan.recipe.variant else ""
        result |= {before + name: fact for name, fact in _plan_facts(plan, ctx)}
    return dict(sorted(result.items()))


def _setting_facts(ctx: Context) -> Iterator[tuple[str, Fact]]:
    this_machine = machine_facts()
    yield ISA, Fact(str(this_machine.get("isa", "")))
    yield "version effc", Fact(str(this_machine.get("effc", "")))
    yield "setting device", Fact(ctx.settings.device)
    yield "setting seed", Fact(str(ctx.settings.seed))
    yield THREADS, Fact(str(ctx.settings.threads))


def _plan_facts(plan: "Plan", ctx: Context) -> Iterator[tuple[str, Fact]]:
    yield from _model_facts(plan.pipeline.model, ctx)
    for name, call in ctx.recipe.data.items():
        yield from _argument_facts(f"data {name}", call)
        yield f"data {name} content", Fact(keys.data_identity(DataRef(name), ctx), call.span)
    for stage in plan.stages:
        name = f"step {plan.pipeline.name}.{stage.name}"
        yield from _argument_facts(name, stage.call)
        for file, content in stage.parts["files"].items():
            yield f"{name} file {file}", Fact(content, stage.span)
        for word, source in stage.parts["source"].items():
            yield f"source {word}", Fact(source, stage.span)
        for library, version in stage.parts["libraries"].items():
            yield f"version {library}", Fact(version, stage.span)
    for number, emit in enumerate(plan.pipeline.emits, 1):
        yield from _argument_facts(f"emit {plan.pipeline.name}.{number}", emit.call)
        yield (
            f"source target {emit.call.word}",
            Fact(keys.plugin_source_fingerprint("target", emit.call.word, ctx), emit.call.span),
        )


def _argument_facts(name: str, call: Invocation) -> Iterator[tuple[str, Fact]]:
    """The word and all its arguments, those that the recipe leaves to their defaults included."""
    yield name, Fact(call.word, call.span)
    for arg, value in keys.to_jsonable(call.args).items():
        yield f"{name} {arg}", Fact(canonical_json(value), call.argument_or_call_span(arg), value)


def _model_facts(name: str, ctx: Context) -> Iterator[tuple[str, Fact]]:
    call, origin = ctx.recipe.models[name], ctx.origin
    yield from _argument_facts(f"model {name}", call)
    yield f"model {name} identity", Fact(origin.identity, call.span)
    if origin.folder is None or not origin.folder.is_dir():
        return
    if origin.folder.parent.name == "snapshots":  # as the hub's cache lays a repository out: the folder is the commit
        yield f"model {name} commit", Fact(origin.folder.name, call.argument_or_call_span("revision"))
    for file in _model_files(origin.folder, origin.label):
        yield f"model {name} file {file.name}", Fact(cached_file_hash(file, ctx.settings.cache_dir), call.span)


def _model_files(folder: Path, label: str) -> list[Path]:
    """Config, tokenizer and weights."""
    plain = [folder / name for name in ("config.json", *TOKENIZER_FILES) if (folder / name).is_file()]
    return plain + (
        list(read_weight_headers(folder, label).files.values()) if any(folder.glob("*.safetensors")) else []
    )


# -- the file ------------------------------------------------------------------------------------------------


def write_lock(recipe_path: Path, facts_by_name: Mapping[str, Fact]) -> Path:
    """Put a recipe's facts into the lock beside it; what the lock says of others stays."""
    lock = lockfile.read_package_lock(recipe_path.parent)
    lock["recipes"][recipe_path.name] = {name: fact.stored for name, fact in facts_by_name.items()}
    return lockfile.write_package_lock(recipe_path.parent, lock)


def read_lock(recipe_path: Path) -> dict[str, Any]:
    """Read the lock beside a recipe. Raises Reject (no-lock, broken-lock)."""
    stored = lockfile.read_package_lock(recipe_path.parent)["recipes"].get(recipe_path.name)
    if stored is None:
        message = f"{recipe_path.parent / lockfile.NAME} says nothing of {recipe_path.name}"
        raise no_lock(message, help=f"write it with `effc lock {quote(str(recipe_path))}`").rejection()
    return stored


def with_locked_threads(recipe_path: Path, settings: Settings) -> Settings:
    """Settings with the threads that the lock names, where the command line names none."""
    text = str(read_lock(recipe_path).get(THREADS, ""))
    if settings.threads is None and text.isdecimal() and 0 < int(text) <= MAX_THREADS:
        return replace(settings, threads=int(text))
    return settings


def refuse_lock_drift(
    recipe_path: Path, facts_by_name: Mapping[str, Fact], settings: Settings, is_partial: bool = False
) -> None:
    """Raise Reject (lock-drift) with every fact that is not as the lock has it, each at its place.

    is_partial   the facts are of some of the recipe's pipelines: the lock speaks of more
    """
    stored = dict(read_lock(recipe_path))
    isa = stored.pop(ISA, "")
    if isa != facts_by_name[ISA].text:
        message = f"the lock was written with kernels for {isa}, these are for {facts_by_name[ISA].text}"
        settings.on_event(Warned(other_level(message)))
    differences = [_lock_drift(name, stored.get(name), fact) for name, fact in facts_by_name.items() if name != ISA]
    faults = [d for d in differences if d]
    faults += [
        lock_drift(f"`{name}` is in the lock and not in the recipe", help=HELP)
        for name in stored
        if name not in facts_by_name and not is_partial
    ]
    if faults:
        raise Reject(*faults)


def _lock_drift(name: str, locked_value: Any, current: Fact) -> Diagnostic | None:
    if locked_value is None:
        return lock_drift(f"the lock has no `{name}`", current.span, help=HELP)
    if current.equals(locked_value):
        return None
    before, after = (
        _shorten_for_message(locked_value if isinstance(locked_value, str) else canonical_json(locked_value)),
        _shorten_for_message(current.text),
    )
    return lock_drift(f"`{name}` was {before} when it was locked and is {after}", current.span, help=HELP)


def _shorten_for_message(text: str) -> str:
    """A fact for people: an argument as a recipe writes it, other texts as they are, long ones cut."""
    if text[:1] in ("{", "[", '"') or text in ("null", "true", "false"):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            text = value_text(value_from_json(parse_strict_json(text)))
    return text if len(text) <= 40 else f"{text[:18]}…{text[-18:]}"
