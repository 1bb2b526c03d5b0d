"""Each form of an artifact read for what it is, without making a model of it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...dsl.syntax.diagnostics import Reject
from .load import POINTS, facts, forms_of, front_members
from .manifest import NAME, Manifest, artifact_broken, verify_files


def check_forms(path: Path, manifest: Manifest) -> list[str]:
    """The forms that an artifact has, each read by the rules for files that come from anybody.

    Raises Reject where a file is not the one of the manifest, or a form holds what effc would not take.
    """
    verify_files(path, manifest)
    if not facts(manifest.kind):
        raise Reject(
            artifact_broken(
                f"{path / NAME} names a target that effc does not have",
                help="use the effc that wrote it, or a newer one",
            )
        )
    present = [form for form in forms_of(manifest.kind) if (path / form).is_dir()]
    for form in present:
        _CHECKS[form](path / form)
        _check_companion_files(path / form)
    for name, folder in front_members(path, manifest):
        _CHECKS[folder.name](folder)
        _check_companion_files(folder)
        present.append(f"{POINTS}/{name}/{folder.name}")
    return present


def _check_companion_files(folder: Path) -> None:
    """Generation values and tokenizer beside the weights of a form or of its base, read as loading does."""
    from ..models.checkpoints.generation_config import read_generation
    from ..models.checkpoints.model_folder import load_tokenizer, tokenizer_files

    base = folder.parent / "base"
    for path in (folder, base, base / "compact"):
        read_generation(path)
        if tokenizer_files(path):
            load_tokenizer(path, str(path))


def _adapter(folder: Path) -> None:
    from .adapter import check

    check(folder)
    _check_checkpoint(folder.parent / "base")


def _check_reft(folder: Path) -> None:
    from .reft import read_reft

    read_reft(folder)
    base = folder.parent / "base" / "compact"
    if base.is_dir():
        _check_compact(base)


def _check_checkpoint(folder: Path) -> None:
    from ..models.checkpoints.checkpoint import parse_config
    from ..models.checkpoints.config_bounds import check_config_numbers
    from ..models.checkpoints.model_folder import read_config, refuse_adapter
    from ..models.checkpoints.weights import find_weights

    config, weights = read_config(folder / "config.json", str(folder)), find_weights(folder, str(folder))
    refuse_adapter(folder, str(folder))
    check_config_numbers(config, weights.slots, str(folder))
    parse_config(config)
    _check_shapes(config, {name: slot.shape for name, slot in weights.slots.items()}, str(folder))


def _check_shapes(config: dict[str, Any], stored: Mapping[str, tuple[int, ...]], label: str) -> None:
    """Raises Reject (other-weights) where a model of the config, without storage, has other shapes than the weights of
    its names, or far more numbers."""
    import torch

    from ..models.checkpoints.checkpoint import build_module, check_loading_info, check_module_size

    with torch.device("meta"):
        module = build_module(config, "float32")
    check_module_size(module, sum(math.prod(shape) for shape in stored.values()))
    tensors = module.state_dict()
    both = [(name, shape, tuple(tensors[name].shape)) for name, shape in stored.items() if name in tensors]
    other = [(name, shape, expected) for name, shape, expected in both if tuple(shape) != expected]
    check_loading_info({"mismatched_keys": other, "missing_keys": (), "unexpected_keys": ()}, label)


def _check_compact(folder: Path) -> None:
    from ..ir import graph_json
    from ..ir.edits import Edits
    from ..models.checkpoints.checkpoint import parse_config
    from ..models.checkpoints.config_bounds import check_config_numbers
    from ..models.checkpoints.weights import find_weights
    from .compact_config import read_record
    from .model_loading import SPARE, empty_edited_model

    record = read_record(folder)
    check_config_numbers(record["base"], find_weights(folder, str(folder)).slots, str(folder), spare=SPARE)
    parse_config(record["base"])
    for entry in Edits.from_json(record["edits"]).graphs.values():
        graph_json.graph_from_json(entry["graph"])
    empty_edited_model(folder, record)


def _program(folder: Path) -> None:
    from .exported import check

    check(folder)


def _native(folder: Path) -> None:
    from ..runtimes.native.opening import verify_checksums

    verify_checksums(folder)


def _check_onnx(folder: Path) -> None:
    from ..core.environment import check_modules
    from ..runtimes.onnx.checking import check_onnx, graphs_in, initializers

    check_modules(("onnx",), "onnx", "an artifact of the target `onnx`")
    for name in graphs_in(folder):
        initializers(folder, check_onnx(folder, name), name)


def _gguf(folder: Path) -> None:
    from ..runtimes.gguf.engine import FILE
    from ..runtimes.gguf.facts import read_facts
    from ..runtimes.gguf.reading import read_gguf

    read_facts(read_gguf(folder / FILE))


_CHECKS: dict[str, Callable[[Path], None]] = {
    "model": _check_checkpoint,
    "compat": _check_checkpoint,
    "compact": _check_compact,
    "program": _program,
    "native": _native,
    "onnx": _check_onnx,
    "gguf": _gguf,
    "adapter": _adapter,
    "reft": _check_reft,
}
