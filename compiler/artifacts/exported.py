"""Programs of torch alone as models: what the target `pt2` wrote, opened again."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...dsl.syntax.diagnostics import Fault, Reject
from ..core.json_errors import first_line, reject_on_error
from ..core.resource_errors import is_out_of_memory
from ..core.safe_read import Unlisted, parse_strict_json, read_regular_file, refuse_irregular_file
from ..ir.layers.linear import count_params as count_plain_params
from ..models.checkpoints.generation_config import read_generation_config
from .openers.export import STEP, STEP_FACTS, Exported

if TYPE_CHECKING:
    from .exported_archive import Archive

FOLDER, FILE, NAMES = "program", "model.pt2", "inputs.json"
KERNELS = "kernels.json"  # beside the program: which of effc's ops it calls, where it calls any
FACTS = "facts.json"  # beside it, too: how many numbers the model holds, which packed weights don't tell
_MAX_FACTS = 1 << 12

rejected_program = Fault(
    "refused-program",
    "An exported program holds something that effc's own programs don't.\n\n"
    "It may come from anybody, and torch's own reader runs code that is in it. effc reads programs that call listed "
    "operators on tensors and numbers, and unpickles nothing.",
    exit="environment",
)


def write_program_and_kernels(program: Any, input_names: tuple[str, ...], folder: Path, params: int) -> list[str]:
    """The names of effc's ops that it calls.

    params   how many numbers the model holds

    Sample inputs, which torch would pickle, are left out, and so are notes of where each call stood in whose files.
    """
    ops = save_and_verify_program(program, input_names, folder / FILE)
    if ops:
        (folder / KERNELS).write_text(json.dumps(ops) + "\n", encoding="utf-8")
        (folder / FACTS).write_text(json.dumps({"params": params}) + "\n", encoding="utf-8")
    return ops


def save_and_verify_program(program: Any, input_names: tuple[str, ...], path: Path) -> list[str]:
    """Write one program, and read it back; the names of effc's ops that it calls."""
    samples, program._example_inputs = program._example_inputs, None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path, extra_files={NAMES: json.dumps(input_names)})
    program._example_inputs = samples
    _refuse_unlisted_operators(path)
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    return sorted({name for name in called if name.startswith("effc.")})


def _refuse_unlisted_operators(path: Path) -> None:
    """Check before writing what is checked on reading: Reject where a program calls an operator that is not listed."""
    from .exported_archive import read_checked_archive

    try:
        read_checked_archive(path)
    except Unlisted as error:
        raise rejected_program(
            f"the exported program holds {error}, which effc would not read again",
            help="`hf` and `native` write the model in other ways",
        ).rejection() from error


def check_exported_folder(folder: Path) -> None:
    """Raises Reject (refused-program) unless a file holds listed calls and plain tensors alone, of sizes that fit."""
    _deserialize_module(folder / FILE, _read_archive(folder / FILE))
    if (folder / STEP).exists():
        _deserialize_module(folder / STEP, _read_archive(folder / STEP))
        _read_step_facts(folder)


def map_program_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights and constants of a program by name, mapped from its file. Raises Reject (refused-program)."""
    archive = _read_archive(path)
    yield from archive.weights.items()
    yield from archive.constants.items()


def _read_step_facts(folder: Path) -> Any:
    from .exported_steps import read_step_facts

    with reject_on_error(
        rejected_program, f"{folder / STEP_FACTS} does not say what {STEP} takes", "compile it again with this effc"
    ):
        return read_step_facts(folder)


def _read_archive(path: Path) -> "Archive":
    from ...kernels import ops as _registered  # noqa: F401 (torch knows effc's ops from here on)
    from .exported_archive import read_checked_archive

    try:
        refuse_irregular_file(path)
        return read_checked_archive(path)
    except Unlisted as error:
        raise _unlisted_content_rejection(path, error) from error
    except OSError as error:
        raise rejected_program(f"{path} can't be read: {error.strerror}").rejection() from error


def _read_stated_params(folder: Path) -> int | None:
    """Number of parameters that a program with packed weights states; None where it has none or states none."""
    path = folder / FACTS
    if not path.exists():
        return None
    try:
        stored = parse_strict_json(read_regular_file(path, _MAX_FACTS))["params"]
        if type(stored) is int and 0 < stored < 1 << 48:
            return stored
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise rejected_program(f"{path} states no number of params", help="compile it again with this effc").rejection()


def load_exported_model(folder: Path) -> nn.Module:
    """Raises Reject (refused-program) on files that hold anything but listed calls and plain tensors.

    return   `Exported`; with a program that continues text beside it, a model that generates
    """
    archive, n_params = _read_archive(folder / FILE), _read_stated_params(folder)
    plain = Exported(_deserialize_module(folder / FILE, archive), archive.inputs, n_params)
    if not (folder / STEP).exists():
        return plain
    from .exported_steps import Continued

    facts, archive = _read_step_facts(folder), _read_archive(folder / STEP)
    facts_of_model = {
        "class": "exported program",
        "params": n_params or count_plain_params(plain),
        "vocabulary": _vocab_size_by_forward(folder, plain),
    }
    model = Continued(
        plain, _deserialize_module(folder / STEP, archive), facts, facts_of_model, read_generation_config(folder)
    )
    model.name_or_path = model.config._name_or_path = str(folder)
    return model.eval()


def _vocab_size_by_forward(folder: Path, prefill: Exported) -> int:
    """Vocabulary size of a program, by the shape of its logits."""
    with torch.no_grad():
        logits = prefill(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise rejected_program(f"{folder / FILE} gives no logits", help="compile it again with this effc").rejection()
    return logits.shape[-1]


def _unlisted_content_rejection(path: Path, error: Unlisted) -> Reject:
    return rejected_program(f"{path} holds {error}", help="compile it again with this effc").rejection()


def _deserialize_module(path: Path, archive: "Archive") -> nn.Module:
    from torch._export.serde import schema, serialize  # torch.export.load is these and a reader that unpickles

    from .exported_shapes import check_module, check_shapes_on_call

    try:
        data = serialize._dict_to_dataclass(schema.ExportedProgram, archive.program)
        program = serialize.ExportedProgramDeserializer().deserialize(data, archive.weights, archive.constants, b"")
        module = program.module()
        check_module(module)
        check_shapes_on_call(module, partial(_unlisted_content_rejection, path))
        return module
    except MemoryError:
        raise
    except Unlisted as error:
        raise _unlisted_content_rejection(path, error) from error
    except Exception as error:  # torch reads what is listed, and may still find that it makes no program
        cause = error.__cause__ or error  # the other one begins with all that the node says
        if is_out_of_memory(cause):
            raise MemoryError(first_line(cause)) from error
        raise rejected_program(
            f"{path} holds no program that torch can read",
            note=f"{type(cause).__name__}: {first_line(cause)}",
            help="compile it again with this effc and this torch",
        ).rejection() from error
