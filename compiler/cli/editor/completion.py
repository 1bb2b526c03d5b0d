"""Completion at a position: statements, words, parameters and values, the model's own module paths."""

import os
import re
from collections.abc import Iterator

from lsprotocol import types as lsp

from ....dsl.checker import profiles
from ....dsl.checker.params import HANDLES, TYPES
from ....dsl.checker.skeleton import Skeleton
from ....dsl.checker.type_phrases import expected_phrase, sample_value_text
from ....dsl.checker.units import BYTES, COUNTS, DURATIONS
from ....dsl.checker.vocabulary import Param, Vocabulary, Word
from ....dsl.syntax import ast
from ....dsl.syntax.edition import HEADS
from ...plugin.recipe_library import library_files
from .cursor import CursorContext, Frame, cursor_context_at
from .names import Occurrence, occurrences
from .open_documents import OpenDocuments, Reading
from .word_pages import parameter_text

Kind = lsp.CompletionItemKind
_OF_HEAD = {"model": "model", "data": "data", "pipeline": "pass", "emit": "target", "expect": "metric"}
_UNITS = {
    "ratio": ("%",),
    "bytes": tuple(BYTES),
    "duration": tuple(DURATIONS),
    "int": tuple(COUNTS),
    "float": tuple(COUNTS),
}
_GROUPS = {
    "channels": ("channels",),
    "heads": ("heads", "kv_heads"),
    "kv_heads": ("kv_heads", "heads"),
    "experts": ("experts",),
}
MAX_ITEMS = 400  # items of an answer


def completion_list(reading: Reading, offset: int, documents: OpenDocuments) -> lsp.CompletionList:
    where = cursor_context_at(reading.source, offset)
    items = [] if where.comment else list(_CompletionItems(where, reading, documents).items())
    replaced = reading.lines.between(where.start, offset)
    for item in items:
        item.text_edit = lsp.TextEdit(replaced, item.insert_text or item.label)
        item.filter_text = item.filter_text or item.label
        item.insert_text = None
    return lsp.CompletionList(is_incomplete=False, items=items[:MAX_ITEMS])


class _CompletionItems:
    def __init__(self, location: CursorContext, reading: Reading, documents: OpenDocuments):
        self.location, self.reading, self.documents = location, reading, documents
        self.vocabulary: Vocabulary = documents.vocabulary

    def items(self) -> Iterator[lsp.CompletionItem]:
        where = self.location
        if where.call:
            yield from self.argument_items(where.call)
        elif where.quoted:
            if where.head == "use":
                yield from self.file_items(".effspec")
        elif where.frames and where.frames[-1].sign == "{":
            yield from self.block_items()
        elif where.frames:
            if where.head == "pipeline":
                yield from self.declared_name_items("model")
        elif where.first:
            yield from (_item(head, Kind.Keyword) for head in HEADS)
        else:
            yield from self.statement_head_items()

    def statement_head_items(self) -> Iterator[lsp.CompletionItem]:
        """Behind the keyword of a statement."""
        head, before = self.location.head, self.location.before
        if before == ("use",):
            yield from (_item(s.name, Kind.Module, s.sentence) for s in library_files().values() if s.is_module)
        elif before[-1:] == ("=",) and head in ("model", "data"):
            yield from self.plugin_items(head)
        elif before[-1:] == (":",) and head == "param":
            yield from (_item(t, Kind.TypeParameter) for t in (*TYPES, *HANDLES))
        elif len(before) == 1 and head in ("expect", "emit"):
            yield from self.declared_name_items("pipeline")
        elif len(before) == 1 and head == "matrix":
            yield from self.declared_name_items("param")

    def block_items(self) -> Iterator[lsp.CompletionItem]:
        """Inside the braces of a statement."""
        head, before = self.location.head, self.location.before
        if head == "pipeline" and before[-1:] == ("=",):
            yield from self.plugin_items("pass")
            yield from self.pipeline_items()
        elif head == "emit":
            yield from self.plugin_items("target")
        elif head == "expect" and before[-1:] == ("*",):
            yield from self.declared_name_items("model")
        elif head == "expect" and before[-1:] == ("on",):
            yield from self.declared_name_items("profile")
        elif head == "expect" and before[-1:] == ("in",):
            yield from self.result_part_items()
        elif head == "expect" and before[-1:] not in (("<=",), (">=",), ("<",), (">",), ("==",)):
            yield from self.plugin_items("metric")
        elif head == "profile" and before[-1:] != (":",):
            yield from (_item(p.name, Kind.Property, p.doc, f"{p.name}: ") for p in profiles.KEYS)
        elif head == "profile" and (key := profiles.profile_key_param(before[-2])):
            yield from self.value_items(key, None)

    def argument_items(self, call: Frame) -> Iterator[lsp.CompletionItem]:
        word = self.plugin_of_call(call)
        if word is None:
            return
        if call.argument == "from":
            yield from self.declared_name_items("step")
            yield from self.model_items()
        elif call.argument:
            if param := word.param(call.argument):
                yield from self.value_items(param, word)
        else:
            slots = [p for p in word.params if p.positional]
            if call.slot < len(slots):
                yield from self.value_items(slots[call.slot], word)
            if not self.location.quoted and self.location.frames[-1].call:
                yield from self.parameter_items(word, call)

    def parameter_items(self, plugin: Word, call: Frame) -> Iterator[lsp.CompletionItem]:
        for i, param in enumerate(p for p in plugin.params if p.name not in call.names):
            rank = f"{'0' if param.required else '1'}{i:03}"
            yield _item(param.name, Kind.Field, expected_phrase(param), f"{param.name}: ", parameter_text(param), rank)
        if plugin.kind in ("pass", "target") and "from" not in call.names and self.location.depth == 1:
            yield _item("from", Kind.Field, "the step or model that it works on", "from: ", sort_text="2")

    def plugin_of_call(self, call: Frame) -> Word | None:
        kind = _OF_HEAD.get(self.location.head, "") if self.location.depth == 1 else "metric"
        return self.vocabulary.word(kind, call.call)

    def value_items(self, param: Param, plugin: Word | None) -> Iterator[lsp.CompletionItem]:
        """Values of a parameter, as far as they can be named."""
        where, types = self.location, {t.removeprefix("list[").removesuffix("]") for t in param.types}
        if where.quoted:
            yield from self.module_path_items(types, plugin)
            if plugin and param.name in plugin.facts.get("reads", {}):
                yield from self.file_items("")
            return
        if where.number:
            yield from (_item(u, Kind.Unit) for t in sorted(types) for u in _UNITS.get(t, ()) if u)
            return
        if where.before[-1:] == ("of",):
            yield from (_item(base, Kind.EnumMember) for base in param.of)
            return
        for choice in param.choices:
            yield _item(
                choice, Kind.EnumMember, "default" if choice == param.default else "", _choice_as_declared(choice)
            )
        if "bool" in types:
            yield from (_item(v, Kind.Value) for v in ("true", "false"))
        for kind in ("data", "model", "profile", "step"):
            if kind in types:
                yield from self.declared_name_items(kind)
        if "metric" in types:
            yield from self.plugin_items("metric")
        if "selector" in types:
            yield from self.module_path_items(types, plugin, quotes='"')
        if "ratio" in types:
            yield from (_item(f"85% of {base}", Kind.Value) for base in param.of)
        elif (
            (text := sample_value_text(param))
            and not param.choices
            and types & {"bytes", "duration", "shares", "range"}
        ):
            yield _item(text, Kind.Value)
        yield from self.declared_name_items("param")

    def declared_name_items(self, kind: str) -> Iterator[lsp.CompletionItem]:
        """Names of a kind that are declared above, those of modules included."""
        for name, occurrence in self.declared_names().items():
            inside = kind != "step" or (occurrence.pipeline == self.location.subject and name != self.location.step)
            if occurrence.kind == kind and inside and (occurrence.span.start < self.location.start or "." in name):
                yield _item(name, Kind.Variable, kind)

    def model_items(self) -> Iterator[lsp.CompletionItem]:
        """The one that the pipeline starts from."""
        for statement in self.reading.file.statements:
            if isinstance(statement, ast.Pipeline) and statement.name.path == self.location.subject:
                yield _item(statement.model.path, Kind.Variable, "model")

    def pipeline_items(self) -> Iterator[lsp.CompletionItem]:
        """Pipelines of modules, which a step may call."""
        for name, occurrence in self.declared_names().items():
            if occurrence.kind == "pipeline" and "." in name:
                yield _item(name, Kind.Function, "pipeline", f"{name}(")

    def declared_names(self) -> dict[str, Occurrence]:
        """Declared names; `alias.name` of modules."""
        declared = {o.name: o for o in occurrences(self.reading.file, self.vocabulary) if o.declares}
        for statement in self.reading.file.statements:
            if isinstance(statement, ast.Use):
                declared |= dict(self.module_members(statement))
        return declared

    def module_members(self, statement: ast.Use) -> Iterator[tuple[str, Occurrence]]:
        from ....dsl.checker.modules import resolved_module_name

        path = self.documents.module_path(
            resolved_module_name(statement.target, self.reading.source.name), self.reading.path
        )
        module = self.documents.parse_any_file(path) if path else None
        if module is None:
            return
        alias = (
            statement.alias.path
            if statement.alias
            else statement.target.path.rpartition(".")[2]
            if isinstance(statement.target, ast.Name)
            else ""
        )
        for occurrence in occurrences(module.file, self.vocabulary):
            if occurrence.declares and not occurrence.pipeline and occurrence.kind != "module":
                yield f"{alias}.{occurrence.name}", occurrence

    def plugin_items(self, kind: str) -> Iterator[lsp.CompletionItem]:
        for name in self.vocabulary.words(kind):
            word = self.vocabulary.words(kind)[name]
            needs = kind != "metric" or any(p.required for p in word.params)
            yield _item(name, Kind.Function, word.summary, f"{name}(" if needs else name)

    def result_part_items(self) -> Iterator[lsp.CompletionItem]:
        """Completions of `in`: targets of the pipeline, points of a front, any."""
        for statement in self.reading.file.statements:
            if isinstance(statement, ast.Emit) and statement.pipeline.path == self.location.subject:
                yield from (_item(call.name.path, Kind.EnumMember, "target") for call in statement.targets)
        yield from self.declared_name_items("step")
        yield _item("any", Kind.Keyword, "any point of a front")

    def file_items(self, suffix: str) -> Iterator[lsp.CompletionItem]:
        """Files and folders beside the recipe, or in the folder that is written so far."""
        folder, slash, _ = self.location.word.rpartition("/")
        try:
            entries = sorted(os.scandir(self.reading.path.parent / folder), key=lambda e: e.name)[:MAX_ITEMS]
        except (OSError, ValueError):
            return
        for entry in entries:
            if not entry.name.startswith(".") and (entry.is_dir() or entry.name.endswith(suffix)):
                kind = Kind.Folder if entry.is_dir() else Kind.File
                start = folder + slash if slash or not suffix else "./"
                yield _item(f"{start}{entry.name}{'/' * entry.is_dir()}", kind)

    def module_path_items(self, types: set[str], plugin: Word | None, quotes: str = "") -> Iterator[lsp.CompletionItem]:
        """Module paths of the recipe's models: the globs that cover layers first."""
        if "selector" not in types:
            return
        module_paths = [
            p
            for s in self.reading.skeletons
            for p in selectable_paths(s, plugin.facts.get("acts_on", "") if plugin else "")
        ]
        globs = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in module_paths)
        for rank, path in enumerate(dict.fromkeys([*globs, *module_paths])):
            count = sum(re.sub(r"\.\d+(?=\.|$)", ".*", p) == path for p in set(module_paths))
            detail = f"{count} modules" if count > 1 else "module"
            text = f"{quotes}{path}{quotes}"
            yield _item(text, Kind.Value, detail, sort_text=f"{rank:05}")


def selectable_paths(skeleton: Skeleton, acts_on: str) -> list[str]:
    """The paths that a pass selects from; every module's where it says nothing."""
    if acts_on in _GROUPS:
        return [g.site for g in skeleton.groups if g.kind in _GROUPS[acts_on]]
    if acts_on == "branches":
        return [b.site for b in skeleton.branches]
    if acts_on == "layers":
        return list(skeleton.units)
    if acts_on.startswith(("ssm", "scans")):
        return [b.site for b in skeleton.branches if b.role == "ssm"]
    return [p.path for p in skeleton.parts]


def _choice_as_declared(choice: str) -> str:
    return choice if choice.isidentifier() else f'"{choice}"'


def _item(
    label: str,
    kind: lsp.CompletionItemKind,
    detail: str = "",
    insert_text: str = "",
    documentation: str = "",
    sort_text: str = "",
) -> lsp.CompletionItem:
    return lsp.CompletionItem(
        label,
        kind=kind,
        detail=detail or None,
        documentation=lsp.MarkupContent(lsp.MarkupKind.Markdown, documentation) if documentation else None,
        insert_text=insert_text or label,
        sort_text=sort_text or None,
    )
