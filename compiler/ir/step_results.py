"""Results of a pipeline's steps: one in memory, the others in the cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.cache import Cache
from ..core.events import announcing_stage
from ..core.json_errors import first_line
from ..core.safe_read import MALFORMED
from ..core.sealed_json import cache_damaged
from ..models.checkpoints.origin import Origin
from .capture.capture import capture
from .outcome import Model, Outcome, Point, outcome_class_of_entry
from .program import Program


@dataclass
class StepResults:
    """Results of a pipeline's steps by key; of the recipe's model the key is its identity.

    on_original   hears of the original once it is captured, while it is still the original
    outcome       the result in memory, if there is one, and its `key`
    """

    cache: Cache
    origin: Origin
    on_original: Callable[[Program], None] = lambda program: None
    outcome: Outcome | None = None
    key: str = ""

    def load_outcome(self, key: str) -> Outcome:
        """Result under a key: the one in memory, a stored one, or the original captured.

        Raises Reject (cache-damaged) where the stored one does not fit its model.
        """
        if self.outcome is None or self.key != key:
            self.release()  # frees the one in memory before another is loaded
            self.outcome = self._captured() if key == self.origin.identity else self._restore_outcome(key)
            self.key = key
        return self.outcome

    def release(self) -> None:
        """Forget the result in memory: it is used up, or about to be changed."""
        self.outcome, self.key = None, ""

    def save_outcome(self, key: str, outcome: Outcome, key_fields: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Store a finished step, whose result is then the one in memory.

        Raises Reject (model-changed) where it was computed from other files than were hashed.
        """
        body = outcome.store(self.cache, self.origin)
        self.origin.refuse_changed_files()
        self.cache.write_step_record(
            key, key_fields, {"tensors": {}, "borrowed": {}, "edits": {}, **body, "notes": dict(notes)}
        )
        self.outcome, self.key = outcome, key

    def program_of(self, key: str) -> Program:
        """Program of a step that gives a model; the caller has it, nobody else does."""
        outcome = self.load_outcome(key)
        assert outcome.in_place and outcome.program, f"{key} gives {outcome.kind}"
        self.release()
        return outcome.program

    def program_at(self, point: Point) -> Program:
        """Program of a front's point: a step's, or a choice of a family, cut out."""
        outcome = self.load_outcome(point.key)
        self.release()
        return outcome.program_at(point)

    def base_program(self, key: str) -> Program:
        """Program that a result belongs to, by the key that `Outcome.with_base` was handed."""
        return self.program_of(key or self.origin.identity)

    def _captured(self) -> Model:
        with announcing_stage("loading the model"):
            program = capture(self.origin.load())
        self.on_original(program)
        return Model(program)

    def _restore_outcome(self, key: str) -> Outcome:
        with announcing_stage("loading the result of the step before"):
            body = self.cache.read_complete_step(key)
            assert body is not None, f"step {key} is not in the cache"
            try:
                return outcome_class_of_entry(body).restore(body, self)
            except (*MALFORMED, AssertionError) as error:
                raise cache_damaged(
                    f"step {key[:12]} of the cache does not fit its model: {type(error).__name__}: {first_line(error)}",
                    help=f"remove {self.cache.folder / 'steps' / key}.json, then compile again",
                ).rejection() from error
