"""Settings of a run, as the command line or the Python API grants them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ...dsl.checker.profiles import MAX_THREADS
from . import options
from .events import Listener, silent

MAX_SEED = 2**32 - 1
UNDECIDED = ("fail", "pass")


@dataclass(frozen=True)
class Settings:
    """Settings of the command line; equal for every recipe of a run.

    Values are read by the rules below, so that sizes and times may be texts. Raises Reject (bad-option) with all that
    mean nothing.
    """

    cache_dir: Path
    seed: int = 0
    device: str = "cpu"
    offline: bool = False
    trust_remote_code: bool = False
    max_memory: int | None = None  # bytes
    threads: int | None = None
    undecided: str = "fail"  # or "pass": what a timed bound that can't be decided comes to
    locked: bool = False  # refuse what is not as `effspec.lock` has it
    on_event: Listener = silent
    workers: str = ""  # how many processes score, "ray" or "ray:ADDRESS"; "" has none
    max_time: float | None = None  # seconds that searches may take
    signed_by: Sequence[str] = ()  # public keys, one of which must have signed each artifact that a recipe opens

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in options.apply_option_rules(values, RULES).items():
            object.__setattr__(self, name, value)


RULES: dict[str, options.Rule] = {
    "cache_dir": options.path_rule,
    "seed": options.integer_rule(0, MAX_SEED),
    "device": options.checked_device_name,
    "offline": options.boolean_rule,
    "trust_remote_code": options.boolean_rule,
    "max_memory": options.optional_rule(options.parse_byte_count),
    "threads": options.optional_rule(options.integer_rule(1, MAX_THREADS)),
    "undecided": options.choice_rule(*UNDECIDED),
    "locked": options.boolean_rule,
    "on_event": options.listener_rule,
    "workers": options.workers_rule,
    "max_time": options.optional_rule(options.parse_seconds),
    "signed_by": lambda keys: tuple(options.text_list_option(keys)) if keys else (),
}
