"""A model in a GGUF file, as llama.cpp uses it."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.source_file import irregular_kind_of_path
from ...core.cache import canonical_json_sha256, write_atomic_if_permitted
from ...core.environment import check_modules
from ...core.hashes import cached_file_hash
from ...core.json_errors import first_line
from ...core.resource_errors import is_out_of_memory
from ...core.safe_read import refuse_irregular_file
from ...core.sealed_json import cache_damaged, read_self_named_record, sealed_json_bytes
from ...models.checkpoints.config_bounds import refuse_excessive_config_numbers
from ...models.checkpoints.gguf_header import check_gguf_header
from ...models.checkpoints.model_folder import WIDTHS
from ...models.checkpoints.origin import Origin
from ...models.checkpoints.safetensors_header import TensorSlot
from ...models.checkpoints.source_files import SourceFiles
from ...models.checkpoints.weights import no_model, read_weight_headers
from ...plugin.context import Context
from ...plugin.interfaces import Source, param

if TYPE_CHECKING:
    from torch import nn

invalid_gguf = Fault(
    "bad-gguf", "A GGUF file is cut, is not one, or holds an architecture that can't be read.", exit="environment"
)

# What the readers of gguf and transformers raise for a file that they weren't written for.
_BREAKS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
FILE = "model.gguf"
OFFLINE_OPTIONS = {"local_files_only": True, "trust_remote_code": False}
FORMAT = 2  # of what lies in the cache folder
_FILES = "effc-files"  # a record in the folder of the hashes of all others


class Gguf(Source):
    """A model in a GGUF file, as llama.cpp uses it.

    The weights are dequantized once, exactly, to float32 safetensors in the cache folder (four bytes a weight,
    named by the hash of the file) and mapped from there ever after. The tokenizer comes from the file too.

    Source: transformers, "GGUF and interaction with Transformers"; the `gguf` package of llama.cpp.
    Example: model base = gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    """

    extra: ClassVar[str] = "gguf"
    requires: ClassVar[tuple[str, ...]] = ("gguf", "accelerate")

    reads = {"path": ("file",)}

    path: str = param("The file, relative to the recipe.", positional=True)
    dtype: Literal["float32", "bfloat16", "float16"] = param(
        "What weights are held and computed in; float32 is exact.", default="float32"
    )

    def resolve(self, ctx: Context) -> Origin:
        check_modules(self.requires, self.extra, "model source gguf")
        path = ctx.folder / Path(self.path).expanduser()
        label = f'gguf("{self.path}")'
        if kind := irregular_kind_of_path(path):
            raise no_model(f"{label}: {path} is {kind}, where a file is needed", help="name a file").rejection()
        if not os.path.isfile(path):
            raise no_model(f"{label}: there is no file {path}", help="paths are relative to the recipe").rejection()
        files = SourceFiles(ctx.settings.cache_dir)
        content = files.hash(path)
        key = canonical_json_sha256([FORMAT, content, version("transformers"), version("gguf")])
        folder = ctx.settings.cache_dir / "gguf" / key
        description = _config_and_weight_count(path, folder.with_name(f"{key}.json"), label, files)
        config = description["config"]
        converted = partial(_converted_folder, path, folder, config, label, files)
        return Origin(
            label=label,
            config=config,
            folder=folder,
            identity=canonical_json_sha256(["gguf", content, self.dtype]),
            build=partial(_build_empty_model, config, self.dtype),
            load=partial(_load_converted_model, converted, config, self.dtype, label),
            tokenizer=cache(partial(_load_converted_tokenizer, converted, label)),
            dtype=self.dtype,
            tokenizer_identity=canonical_json_sha256(["gguf", content]),
            weight_bytes=description["weights"] * WIDTHS[self.dtype],
            files=files,
        )


def _config_and_weight_count(path: Path, cache_file: Path, label: str, files: SourceFiles) -> dict[str, Any]:
    """`config` as transformers derives it, and the number of `weights`; once, because that needs torch."""
    known = read_self_named_record(cache_file, cache_file.parent)
    if known is not None:
        return known
    slots = read_tensor_shapes(path, label)
    weights = sum(slot.count for slot in slots.values())
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from ...models.checkpoints.checkpoint import without_library_logs

    try:
        with without_library_logs(), _isolated_folder(path) as folder:
            parsed = AutoConfig.from_pretrained(folder, gguf_file=FILE, **OFFLINE_OPTIONS)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)]
        assert isinstance(kind, type), f"several classes for a {type(parsed).__name__}"
    except (*_BREAKS, OSError) as error:
        raise invalid_gguf(
            f"{label}: transformers can't read its architecture", note=first_line(error)
        ).rejection() from error
    config = json.loads(parsed.to_json_string(use_diff=False))
    config |= {"architectures": [kind.__name__], "dtype": "float32"}
    config.pop("_name_or_path", None)
    refuse_excessive_config_numbers(config, slots, label)
    description = {"key": cache_file.stem, "config": config, "weights": weights}
    files.refuse_changed_files()
    write_atomic_if_permitted(cache_file, sealed_json_bytes(description))
    return description


@contextmanager
def _isolated_folder(path: Path) -> Iterator[Path]:
    """A folder with nothing but the file: what lies beside it could name another model, or code of its author."""
    with tempfile.TemporaryDirectory(prefix="effc-gguf-") as folder:
        (Path(folder) / FILE).symlink_to(path.resolve())
        yield Path(folder)


def read_tensor_shapes(path: Path, label: str) -> dict[str, TensorSlot]:
    """The file's tensor table, shapes alone; every tensor lies inside the file, else `Reject`."""
    from gguf import GGUFReader

    refuse_irregular_file(path)
    try:
        check_gguf_header(path)
        tensors = GGUFReader(path).tensors
        return {str(t.name): TensorSlot("F32", tuple(int(n) for n in t.shape), 0, 0) for t in tensors}
    except (*_BREAKS, MemoryError) as error:
        raise invalid_gguf(
            f"{label}: {path} of {path.stat().st_size} bytes is cut or not GGUF",
            help="fetch the file again",
            note=first_line(error),
        ).rejection() from error


def _converted_folder(path: Path, folder: Path, config: dict[str, Any], label: str, files: SourceFiles) -> Path:
    """The folder of safetensors that the file became, made if it is not there; appears whole or not at all.

    Raises Reject (cache-damaged) where a file of it holds something else than was written.
    """
    if folder.is_dir():
        read_weight_headers(folder, label)  # whole: a disk may have lost what was written last
        known = read_self_named_record(folder / f"{_FILES}.json", folder)
        if (
            known is None
            or known.get("of") != folder.name
            or known.get("files") != _hash_by_file_name(folder, files.hash)
        ):
            raise cache_damaged(
                f"{folder} does not hold what was written there", help="delete it, then compile again"
            ).rejection()
        return folder
    import os
    import shutil

    draft = Path(tempfile.mkdtemp(prefix=".gguf-", dir=folder.parent))
    try:
        _convert_to_safetensors(path, draft, label)
        (draft / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        seal = sealed_json_bytes(
            {
                "key": _FILES,
                "of": folder.name,
                "files": _hash_by_file_name(draft, partial(cached_file_hash, cache_dir=files.cache_dir)),
            }
        )
        (draft / f"{_FILES}.json").write_bytes(seal)
        files.refuse_changed_files()  # it was read piece by piece, and its hash names the folder
        os.replace(draft, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return _converted_folder(path, folder, config, label, files)


def _hash_by_file_name(folder: Path, hash: Callable[[Path], str]) -> dict[str, str]:
    """Hash of every file of a converted folder; a large one is read again only where it was written since."""
    files = (file for file in sorted(folder.iterdir()) if file.stem != _FILES)
    return {file.name: hash(file) for file in files}


def _convert_to_safetensors(path: Path, destination: Path, label: str) -> None:
    import io
    from contextlib import redirect_stderr

    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ...models.checkpoints.checkpoint import (
        refuse_mismatched_weights,
        refuse_non_finite_parameters,
        without_library_logs,
    )
    from ...models.checkpoints.tokenizer import tokenizer_panics_as_diagnostics

    try:
        bars = redirect_stderr(io.StringIO())  # a progress bar of its own that nothing turns off
        with without_library_logs(), tokenizer_panics_as_diagnostics(label), _isolated_folder(path) as folder, bars:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=FILE,
                dtype=torch.float32,
                output_loading_info=True,
                use_kernels=False,
                **OFFLINE_OPTIONS,
            )
            model, info = loaded  # a pair, which its annotation does not know
            AutoTokenizer.from_pretrained(folder, gguf_file=FILE, **OFFLINE_OPTIONS).save_pretrained(destination)
    except _BREAKS as error:
        if is_out_of_memory(error):
            raise
        raise invalid_gguf(f"{label}: transformers can't make its model", note=first_line(error)).rejection() from error
    refuse_mismatched_weights(info, label)
    refuse_non_finite_parameters(model, label)
    save_model(model, str(destination / "model.safetensors"), metadata={"format": "pt"})  # tied tensors once


def _build_empty_model(config: dict[str, Any], dtype: str) -> "nn.Module":
    from ...models.checkpoints.checkpoint import build_model_from_config

    return build_model_from_config(config, dtype)


def _load_converted_model(convert_to_folder, config: dict[str, Any], dtype: str, label: str) -> "nn.Module":
    from ...models.checkpoints.checkpoint import load_checked_model

    folder = convert_to_folder()
    return load_checked_model(folder, config, dtype, label, read_weight_headers(folder, label))


def _load_converted_tokenizer(convert_to_folder, label: str) -> Any:
    from ...models.checkpoints.tokenizer import load_checked_tokenizer

    return load_checked_tokenizer(convert_to_folder(), label)
