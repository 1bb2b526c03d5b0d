"""Diagnostics of a model whose own forward fails: what it lacked, and the line of its source."""

import inspect
import linecache
import re
import traceback
from typing import Any

from torch import nn

from ....dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ..layers.leaves import is_model_source
from ..unit import positional_argument_names

unsupported_model = Fault(
    "unsupported-model", "A model does something that effc can't capture as a graph.", exit="environment"
)
stock_failure = Fault(
    "stock-fails",
    "A model's own code in transformers fails on ordinary tokens, before effc has changed anything in it.",
    exit="environment",
)

_WITHOUT_WEIGHTS = "effc looks at a model before its weights are read"
_NO_KERNEL = re.compile(r"Could not run '|no fake impl|Torch not compiled with CUDA|no NVIDIA driver")
# Arguments of forwards that may not do without.
_BESIDES = (
    *("input_ids", "pixel_values", "pixel_values_videos", "input_features", "bbox"),
    "image_embeds_position_mask",
)


def random_draw_diagnostic(error: Exception, model: nn.Module) -> Diagnostic:
    """Diagnostic of a forward that draws numbers; or that makes modules anew, whose weights are drawn: BigBird's
    `set_attention_type` does where rows are short, and its config's `attention_type` says which it has."""
    where, line = failing_module_path(error, model) or type(model).__name__, failing_source_line(error, model)
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    setters = [name.removeprefix("set_") for name in names if name.startswith("set_")]
    switch = next((name for name in setters if hasattr(getattr(model, "config", None), name)), "")
    if "__init__" not in names:
        return unsupported_model(
            f"{where} draws random numbers when it runs, so {error} at {line}", help="let it draw while it trains alone"
        )
    message = f"{where} makes modules anew when it runs, with weights that are drawn, at {line}"
    if not switch:
        return unsupported_model(message, help="let it make all of its modules when it is made")
    return unsupported_model(
        f"{message}: it changes its `{switch}`, which is {getattr(model.config, switch)!r}, for short rows",
        help=f"set `{switch}` in its config.json to the one that it changes to, as 'original_full' of BigBird",
    )


def remedy_for_failed_forward(error: Exception, model: nn.Module, inputs: dict[str, Any]) -> str:
    if _NO_KERNEL.search(str(error)):
        return (
            "torch has no code for that operation on the device that effc looks at models on: register a fake and "
            "a CPU implementation with torch.library, or let the module fall back to torch functions"
        )
    if any(p.is_meta for p in model.parameters()):  # before anything else is said: numbers may be what it lacks
        return (
            f"{_WITHOUT_WEIGHTS}, and gives it {', '.join(inputs)} alone: where it needs more, wrap it in a module of "
            "your own that has `dummy_inputs`; where that line asks what numbers a tensor holds, let it not"
        )
    parameters = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    needed = [
        name for name in positional_argument_names(type(model)) if parameters[name].default is inspect.Parameter.empty
    ]
    lacking = [n for n in dict.fromkeys((*needed, *_BESIDES)) if n in parameters and n not in inputs]
    if lacking:
        names = ", ".join(f"`{name}`" for name in lacking)
        return (
            f"it takes {names} besides, and effc gives it {', '.join(inputs)}: wrap it in a module of your own "
            "whose `dummy_inputs` have all that it takes, and give it rows of `tensors`: `effc explain unknown-inputs`"
        )
    return (
        f"it was given {', '.join(inputs)} alone: where it needs more, wrap it in a module of your own that has "
        "`dummy_inputs`; if a step of the recipe came before, it can't do without what the step removed"
    )


def was_rejected_for_lack_of_weights(rejection: Reject) -> bool:
    """Whether a model was refused that has no weights, and that may run where it has some."""
    return any((diagnostic.help or "").startswith(_WITHOUT_WEIGHTS) for diagnostic in rejection.diagnostics)


def model_failure_diagnostic(model: nn.Module, verb: str, error: Exception) -> Diagnostic:
    """Diagnostic of an exception that a model's own forward or `generate` raised."""
    message = f"{type(error).__name__}: {first_sentence(error)} at {failing_source_line(error, model)}"
    return stock_failure(
        f"{type(model).__name__} fails when it {verb}: {message}",
        help="its code is of the model: take another version of transformers, or another class of the model",
    )


def first_sentence(error: Exception) -> str:
    """First sentence of an exception: torch appends tables of alternatives."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text.split(". ")[0].rstrip(".")


def failing_module_path(error: Exception, model: nn.Module) -> str:
    """The path of the innermost module in whose forward an exception passed; "" for the model itself."""
    paths = {id(module): path for path, module in model.named_modules()}
    entered = [
        paths[id(frame.f_locals["self"])]
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if id(frame.f_locals.get("self")) in paths
    ]
    return entered[-1] if entered else ""


def failing_source_line(error: Exception, model: nn.Module) -> str:
    """Last frame of an exception in the model's own source: file, line and text."""
    files = {
        inspect.unwrap(type(m).forward).__code__.co_filename
        for m in model.modules()
        if is_model_source(type(m).__module__, type(model).__module__)
    }
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if f.filename in files), frames[-1])
    name = frame.filename.rpartition("/")[2]
    return f"{name}:{frame.lineno}: `{linecache.getline(frame.filename, frame.lineno or 0).strip()}`"
