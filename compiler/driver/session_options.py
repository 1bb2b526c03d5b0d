"""Options of a session in Python: the command line's flags, by their names."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ..core import options
from ..core.cache import default_cache_folder
from ..core.events import Listener
from ..core.quantity import with_article
from ..core.settings import Settings


class Options(TypedDict, total=False):
    """Options of `check`, `plan` and `compile`; each is the command line's flag of that name.

    settings            all of the following at once, as such a dict, and no others beside it
    cache_dir           where finished steps are kept
    set                 other values of params: {name: value}, or "name=value" texts
    params              a JSON file of such values
    seed                of all that is random
    device              where passes and metrics compute: "cpu", "cuda", ..., or "auto"
    device_map          the same as transformers spells it, where it names one device: "auto", 0, {"": "cuda:1"}
    offline             never use the network
    trust_remote_code   run Python that a model brings along
    max_memory          bytes, or a text such as "20GiB"
    max_time            seconds that the searches of a compile may take, which then stop at the best so far; or a text
                        such as "30m"
    threads             of torch
    undecided           "fail" or "pass": what a timed bound that can't be decided comes to
    locked              refuse what is not as `effspec.lock` has it
    workers             how many processes score candidates and choices, or "ray", or "ray:ADDRESS"; each has one thread
                        unless `threads` says otherwise, and so has this process
    signed_by           public keys (`p256:...`, or files with some), one of which must have signed each artifact
                        that a recipe takes a model from
    on_event            hears what happens, event by event
    """

    settings: "Settings | Options | None"
    cache_dir: str | Path | None
    set: Mapping[str, Any] | Sequence[str]
    params: str | Path | None
    seed: int
    device: str
    device_map: Any
    offline: bool
    trust_remote_code: bool
    max_memory: int | str | None
    max_time: float | str | None
    threads: int | None
    undecided: str
    locked: bool
    workers: int | str
    signed_by: Sequence[str]
    on_event: Listener


# names until 0.2, which 0.3 drops
_RENAMED_OPTIONS = {"tell": "on_event", "steady": "batch_invariant", "sequences": "max_sequences"}


def with_current_names(values: Any) -> Any:
    """Options under the names that they have now. Raises Reject (bad-option) for one under both names."""
    for old in _RENAMED_OPTIONS.keys() & values.keys():
        new = _RENAMED_OPTIONS[old]
        if new in values:
            fact = f"`{old}` and `{new}` are given, which are one option"
            raise options.invalid_option(fact, help=f"leave out `{old}`, its old name").rejection()
        warnings.warn(f"`{old}` is `{new}` now; the old name goes with 0.3", DeprecationWarning, stacklevel=4)
    return {_RENAMED_OPTIONS.get(name, name): value for name, value in values.items()}


def with_device_of_map(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options with `device` for `device_map`. Raises Reject (bad-option) beside `device`, and for a split."""
    others = {name: value for name, value in values.items() if name != "device_map"}
    if values.get("device_map") is None:
        return others
    if others.get("device") is not None:
        fact = "`device` and `device_map` are given, which say one thing"
        raise options.invalid_option(fact, help="leave out one of them").rejection()
    rules = {"device_map": options.single_device_of_map}
    return others | {"device": options.apply_option_rules({"device_map": values["device_map"]}, rules)["device_map"]}


def session_options(values: Mapping[str, Any]) -> tuple[Settings, Any, Path | None]:
    """Settings, values of params and the file of such values. Raises Reject (bad-option) where one means nothing."""
    _refuse_unknown(values)
    values = with_device_of_map({name: value for name, value in values.items() if value is not None})
    settings = values.pop("settings", None)
    if isinstance(settings, Mapping):
        _refuse_mix(values)
        return session_options({name: value for name, value in settings.items() if name != "settings"})
    rules = {"set": check_param_overrides, "params": options.path_rule}
    inputs = options.apply_option_rules({name: values.pop(name) for name in rules if name in values}, rules)
    if settings is None:
        settings = Settings(**{"cache_dir": default_cache_folder(), **values})
    elif not isinstance(settings, Settings):
        fact = f"`settings` is {with_article(type(settings).__name__)}, which holds no options"
        raise options.invalid_option(fact, help='give a dict of options, such as {"seed": 1}').rejection()
    else:
        _refuse_mix(values)
    return settings, inputs.get("set", ()), inputs.get("params")


def check_param_overrides(value: Any) -> Any:
    """Rule of `set`: {name: value}, or "name=value" texts."""
    if isinstance(value, Mapping):
        fits = all(isinstance(name, str) for name in value)
    else:
        fits = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        fits = fits and all(isinstance(text, str) for text in value)
    if not fits:
        raise options.OptionError("gives no values of params", 'write {"keep": "80%"} or ["keep=80%"]')
    return value


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    if unknown := values.keys() - Options.__annotations__.keys():
        names = ", ".join(sorted(Options.__annotations__))
        raise TypeError(f"effc knows no option `{min(unknown, key=str)}`: {names}")


def _refuse_mix(values: Mapping[str, Any]) -> None:
    """Raises Reject where options stand beside `settings`, which says all of them."""
    if values:
        names = ", ".join(f"`{name}`" for name in sorted(values))
        fact = f"{names} and `settings` are given, which holds all options"
        raise options.invalid_option(fact, help="leave out one of them").rejection()
