"""`effc cache`: what finished steps are kept, why one is not, and keeping it small and sound."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ....dsl.syntax.diagnostics import EXITS
from .flags import SharedFlags, finite_or_bad_parameter, make_verb
from .options import argument, option

if TYPE_CHECKING:
    from ...core.cache import Cache

_recipe = argument("RECIPE", "A recipe; each of its steps is looked up.", readable=False)
_delete = option("Remove what is damaged; compile makes it again.", "--delete")
_age = option(
    "Drop what was not used for so many days.",
    "--older-than",
    metavar="DAYS",
    callback=finite_or_bad_parameter,
    show_default=True,
)


NAMED = 3  # damaged files that are named; a broken disk damages hundreds


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Look after the cache of finished steps.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="cache")
    _register_ls_and_why(group)
    _register_gc_and_verify(group)


def _register_ls_and_why(group: typer.Typer) -> None:
    @make_verb(group, flag_panels=("cache",))
    def ls(shared: SharedFlags) -> None:
        """List finished steps, last used first."""
        cache = _cache(shared)
        entries, n_unreadable = cache.finished_steps(), cache.num_unreadable_steps()
        if shared.format == "json":
            rows = [
                {"key": e.key, "step": _step_as_call(e), "bytes": e.bytes, "used": e.used, "parts": dict(e.parts)}
                for e in entries
            ]
            return shared.screen.answer_json(
                "cache ls", folder=str(shared.cache_folder), steps=rows, unreadable=n_unreadable
            )
        from ...core.quantity import count_text, duration_text, size_text

        if n_unreadable:
            verb = "is" if n_unreadable == 1 else "are"
            shared.screen.note(
                f"{count_text(n_unreadable, 'step')} of {shared.cache_folder} {verb} damaged or of an old version: "
                "`effc cache verify` names them"
            )
        if not entries:
            absence = "no other finished step" if n_unreadable else "no finished step"
            return shared.screen.note(f"{shared.cache_folder} holds {absence}")

        lines = [("key", "step", "size", "used")]
        current_time = time.time()
        lines += [
            (e.key[:12], _step_as_call(e), size_text(e.bytes), f"{duration_text(max(0, current_time - e.used))} ago")
            for e in entries
        ]
        shared.screen.answer(shared.screen.table(lines, right=(2,)))
        return shared.screen.note(f"{count_text(len(entries), 'step')} in {shared.cache_folder}")

    @make_verb(group, flag_panels=("cache", "inputs", "machine"))
    def why(recipe: Annotated[Path, _recipe], shared: SharedFlags) -> None:
        """Say for each step of a recipe whether it is kept, and what differs where it is not."""
        from ...driver import api

        plans = api.plan_all_pipelines(shared.session(recipe))
        rows = [(s.name, s.call.word, "kept" if s.cached else s.reason) for p in plans for s in p.stages]
        if shared.format == "json":
            steps = [{"step": n, "word": w, "cache": r} for n, w, r in rows]
            return shared.screen.answer_json("cache why", steps=steps)
        return shared.screen.answer(shared.screen.table(rows, head=False))


def _register_gc_and_verify(group: typer.Typer) -> None:
    @make_verb(group, flag_panels=("cache",))
    def gc(shared: SharedFlags, older_than: Annotated[float, _age] = 30.0) -> None:
        """Free what was not used for a while, and tensors that no step names."""
        from ...core.quantity import size_text

        freed = _cache(shared).evict_unused_and_count_bytes(keep_seconds=older_than * 86400)
        if shared.format == "json":
            return shared.screen.answer_json("cache gc", freed_bytes=freed)
        return shared.screen.answer(f"freed {size_text(freed)}")

    @make_verb(group, flag_panels=("cache",))
    def verify(shared: SharedFlags, delete: Annotated[bool, _delete] = False) -> int:
        """Read every file again and compare it with its name."""
        cache = _cache(shared)
        damaged = list(cache.damaged_files_with_faults())
        if delete:
            for path, _ in damaged:
                path.unlink(missing_ok=True)
        if shared.format == "json":
            files = [{"path": str(path), "reason": reason, "deleted": delete} for path, reason in damaged]
            has_damage = bool(damaged) and not delete
            shared.screen.answer_json("cache verify", "error" if has_damage else "ok", damaged=files)
            return EXITS["environment"] if has_damage else 0
        return _print_verify_result(shared, damaged, delete, len(cache.finished_steps()))


def _print_verify_result(
    shared: SharedFlags, damaged: list[tuple[Path, str]], is_deleted: bool, step_count: int
) -> int:
    from ...core.quantity import count_text

    if damaged and not is_deleted:
        from ...core.cache import cache_damaged

        named = "\n".join(f"{path}: {reason}" for path, reason in damaged[:NAMED])
        remainder = f"\nand {len(damaged) - NAMED} more; `--format json` has all" if len(damaged) > NAMED else ""
        raise cache_damaged(
            f"{count_text(len(damaged), 'file')} of the cache {'is' if len(damaged) == 1 else 'are'} damaged",
            note=named + remainder,
            help="`effc cache verify --delete` removes what is damaged; compile makes it again",
        ).rejection()
    removed_text = f", {count_text(len(damaged), 'damaged file')} removed" if damaged else ""
    shared.screen.answer(f"ok: {count_text(step_count, 'step')}{removed_text}")
    return 0


def _cache(shared: SharedFlags) -> "Cache":
    from ...core.cache import Cache

    return Cache(shared.cache_folder)


def _step_as_call(entry) -> str:
    """The step as a recipe would write it, without what has its default."""
    from ....dsl.checker.value_text import plain_value_text
    from ....dsl.checker.values import value_from_json
    from ...plugin.registry import Registry

    step = entry.parts.get("step", {})
    word = Registry().vocabulary.word("pass", step.get("word", ""))
    usual = {p.name: p.default for p in word.params} if word else {}
    step_args = {name: value_from_json(value) for name, value in step.get("args", {}).items()}
    args = [
        f"{name}: {plain_value_text(step_args[name])}"
        for name in sorted(step_args, key=list({**usual, **step_args}).index)
        if step_args[name] is not None and (name not in usual or step_args[name] != usual[name])
    ]
    text = f"{step.get('word', 'unknown')}({', '.join(args)})"
    return text if len(text) <= 72 else text[:71] + "…"
