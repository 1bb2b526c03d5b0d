"""Trials of a wish as the cache keeps them, so that a search that was killed goes on and decides the same."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ....dsl.checker.values import DataRef
from ...analysis.planning import keys
from ...core.cache import Cache, canonical_json_sha256, write_atomic
from ...core.fingerprint import machine_facts
from ...core.source_closure import import_closure_sha256
from .alternatives import Candidate
from .trials import Trial
from .wish import Wish

RECIPES = "recipes"  # key of the digests of the recipes and pages that were written
SECONDS = "planned seconds"  # key of those by candidate


@dataclass
class Journal:
    """Trials by candidate and number of rows. `parts` are what they depend on."""

    cache: Cache
    parts: Mapping[str, Any]
    rows: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read_or_make(cls, wish: Wish, cache: Cache) -> "Journal":
        ctx = wish.context
        arguments = {k: v for k, v in keys.to_jsonable(wish.step.call.args).items() if k != "within"}
        parts = {
            "tune": wish.text_with_step_replaced([], ""),
            "open": arguments,
            "model": ctx.origin.identity,
            "params": keys.to_jsonable(wish.recipe.params),
            "rows": [keys.data_identity(DataRef(name), ctx) for name in sorted(wish.data_names)],
            "versions": keys.library_versions(),
            "seed": ctx.seed,
            "threads": ctx.settings.threads,
            "device": ctx.settings.device,
            "machine": machine_facts(),
            "code": import_closure_sha256(Path(__file__).with_name("trials.py")),
        }
        return cls(cache, parts, dict(cache.read_value(parts) or {}))

    def read_trial(self, candidate: Candidate, num_rows: int) -> Trial | None:
        record = self.rows.get(f"{candidate.name} on {num_rows}")
        if record is None:
            return None
        pairs = {name: {k: (v[0], v[1]) for k, v in record[name].items()} for name in ("values", "ranges")}
        return Trial(**{**record, **pairs})

    def write_recipe(self, path: Path, text: str) -> None:
        """Write a recipe that the search came to."""
        self.note_written(text)
        write_atomic(path, text.encode())

    def note_written(self, text: str) -> None:
        """Note a recipe or a page, so that `has_recorded_file` knows it again."""
        self._merge_stored_records()
        self._merge_and_store({RECIPES: sorted({*self.rows.get(RECIPES, ()), canonical_json_sha256(text)})})

    def has_recorded_file(self, path: Path) -> bool:
        """Whether a file is a recipe or a page that this search wrote, unchanged."""
        if not path.is_file() or path.is_symlink():
            return False
        return self.has_recorded_text(path.read_text(encoding="utf-8", errors="replace"))

    def has_recorded_text(self, text: str) -> bool:
        return canonical_json_sha256(text) in self.rows.get(RECIPES, ())

    def first_planned_seconds(self, seconds: Mapping[Candidate, float]) -> dict[Candidate, float]:
        """Seconds of candidates as they were planned first: a plan made later leaves out what is in the cache."""
        self._merge_stored_records()
        known = {candidate.name: planned for candidate, planned in seconds.items()} | self.rows.get(SECONDS, {})
        self._merge_and_store({SECONDS: known})
        return {candidate: known[candidate.name] for candidate in seconds}

    def store_trials(self, trials: Mapping[Candidate, Trial], num_rows: int) -> None:
        self._merge_stored_records()
        self._merge_and_store({f"{candidate.name} on {num_rows}": asdict(trial) for candidate, trial in trials.items()})

    def _merge_stored_records(self) -> None:
        """Read what other searches of this wish kept meanwhile."""
        self.rows |= self.cache.read_value(self.parts) or {}

    def _merge_and_store(self, rows: Mapping[str, Any]) -> None:
        self.rows |= rows
        self.cache.store_value(self.parts, self.rows)
