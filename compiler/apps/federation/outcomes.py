"""Models of a finished federation: the states beside its app, each put into the model that clients started from."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ....dsl.syntax.diagnostics import Fault
from ...core.json_errors import reject_on_error
from ...core.safe_read import MALFORMED, read_json
from .app import PACKAGE
from .declaration import NAME, Declaration, read_declaration, refuse_other_base
from .history import Round
from .low_rank import lora_module_paths
from .results import MARK, PREFIX, STATE
from .state import State, state_fault

if TYPE_CHECKING:
    from torch import nn

    from ...plugin.context import Context

MARKED = 1 << 28  # bytes of the rounds of a federation, at most
INNER = {"project": ("R", "V"), "aim": ("W",), "bias": ("b",)}  # of interventions' files, and arrays that hold them

invalid_result = Fault(
    "bad-federation-result",
    "What lies beside a federation is no result of it.\n\n"
    "`effc run` and `effc federate up` write states for the declaration that they ran; a federation that was compiled "
    "anew has to run again.",
    exit="environment",
)


def result_folder(app: Path) -> Path | None:
    """The folder of states beside an app, of its run here or else of its deployment."""
    candidates = (app.with_name(f"{app.name}-result"), app.with_name(f"{app.name}-deployment") / "result")
    return next((candidate for candidate in candidates if (candidate / MARK).is_file()), None)


def read_rounds(app: Path, declaration: Declaration) -> tuple[Round, ...]:
    """Rounds of the run whose result lies beside an app; () where none of this declaration does."""
    folder = result_folder(app.resolve())
    if folder is None:
        return ()
    try:
        body = read_json(folder / MARK, MARKED)
        return tuple(Round.from_json(r) for r in body["rounds"]) if body["identity"] == declaration.identity else ()
    except (OSError, AttributeError, *MALFORMED):
        return ()  # a picture of the app is none of its result's mistakes


def models_with_trained_states(app: Path, ctx: "Context") -> "Iterator[tuple[str, nn.Module]] | None":
    """The model with each state in it, by the state's name, one at a time; None where the federation has not run.

    A model is good until the next one is asked for. Raises Reject (bad-federation-result) at the call.
    """
    folder = result_folder(app.resolve())
    if folder is None:
        return None
    declared = read_declaration(app / PACKAGE / NAME)
    if declared.trains == "index":
        return None
    refuse_other_base(declared, app / declared.folder, ctx.settings.cache_dir)
    _refuse_other_result(folder, declared)
    states = sorted(f for f in folder.iterdir() if f.is_dir())
    if not states:
        raise invalid_result(f"{folder} holds no state", help="run the federation again: `effc run`").rejection()
    return _models_one_by_one(app, declared, states, ctx)


def _models_one_by_one(
    app: Path, declaration: Declaration, states: list[Path], ctx: "Context"
) -> "Iterator[tuple[str, nn.Module]]":
    from ...driver.models import open_model
    from .client_host import cut_model_and_attach_slots

    model = open_model(str(app / declaration.folder), ctx.settings).model
    with cut_model_and_attach_slots(model, declaration) as slots:
        for folder in states:
            slots.load_state(read_state(folder, declaration), {})
            yield folder.name, slots.model.eval()


def _refuse_other_result(folder: Path, declaration: Declaration) -> None:
    with reject_on_error(invalid_result, f"{folder / MARK} can't be read", "run the federation again"):
        body = read_json(folder / MARK, MARKED)
        same = body["identity"] == declaration.identity and body["base"] == declaration.base
    if not same:
        raise invalid_result(
            f"{folder} is the result of another federation", help="run this one again: `effc run`"
        ).rejection()


def read_state(folder: Path, declaration: Declaration) -> State:
    """The arrays of a folder that `write_results` wrote, under the names of a declaration.

    Raises Reject (bad-federation-result) where it holds other ones.
    """
    from safetensors.numpy import load_file

    names = (STATE, "adapter_model.safetensors", "reft/model.safetensors", "head.safetensors")
    arrays: dict[str, np.ndarray] = {}
    for file in (folder / name for name in names):
        if file.is_file():
            with reject_on_error(invalid_result, f"{file} can't be read", "run the federation again"):
                arrays |= {_array_name_of_file_key(name, declaration): array for name, array in load_file(file).items()}
    expected = dict(declaration.full)
    for path in lora_module_paths(expected):  # of stacks, and of clients of less rank
        rank = arrays[f"{path}.A"].shape[:1] if f"{path}.A" in arrays else ()
        if rank and rank[0]:
            expected[f"{path}.A"] = (rank[0], expected[f"{path}.A"][1])
            expected[f"{path}.B"] = (expected[f"{path}.B"][0], rank[0])
    if problem := state_fault(arrays, expected):
        raise invalid_result(
            f"{folder} is no state of the federation: {problem}", help="run the federation again"
        ).rejection()
    return arrays


def _array_name_of_file_key(name: str, declaration: Declaration) -> str:
    """The name of an array that a file calls so."""
    name = name.removeprefix(f"{PREFIX}.")
    for side in "AB":
        name = name.replace(f".lora_{side}.weight", f".{side}")
    path, _, last = name.rpartition(".")
    return next((f"{path}.{n}" for n in INNER.get(last, ()) if f"{path}.{n}" in declaration.full), name)
