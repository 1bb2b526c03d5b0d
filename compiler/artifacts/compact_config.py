"""config.json of a checkpoint with true shapes: what effc needs to rebuild it, and a seal for everyone else.

The original config and the edits are under the key `effc`. Plain transformers must not load such a folder: it
would fill the tensors of dropped branches at random and only log it. So `model_type` is "effc", which
`AutoModel` refuses by name, and `transformers_weights` names a file that doesn't exist, which the model
classes themselves stumble over.
"""

import json
import types
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...dsl.syntax.diagnostics import Fault
from ..core.json_errors import reject_on_error
from ..core.safe_read import MANIFEST, read_json

FORMAT = 1
KEY = "effc"
_DTYPES = ("float32", "bfloat16", "float16", "float64")
CONFIG = "config.json"
_SEAL = {"model_type": "effc", "transformers_weights": "load-this-folder-with-effc.safetensors"}

not_sealed = Fault("no-effc-config", "A folder's config.json was not written by effc.", exit="environment")


def make_compact_record(base_config: Mapping[str, Any], edits_json: Any, dtype: str) -> dict[str, Any]:
    """Record under the key `effc`. `base_config` is the config before any edit, `edits_json` is `Edits.to_json()`."""
    from ..core.fingerprint import library_versions

    return {
        "format": FORMAT,
        "base": dict(base_config),
        "edits": edits_json,
        "dtype": dtype,
        "versions": library_versions(),
    }


def lock_config_to_effc(folder: Path) -> None:
    """Make the config.json that transformers wrote into the folder one that only effc loads."""
    file = folder / CONFIG
    body = json.loads(file.read_bytes())
    assert KEY in body, f"{file} has no key {KEY}"
    file.write_text(json.dumps(body | _SEAL, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_compact_record(folder: Path) -> dict[str, Any]:
    """The record of a folder, checked; Reject where there is none."""
    file = folder / CONFIG
    with reject_on_error(not_sealed, f"{file} is no JSON that can be read"):
        body = read_json(file, MANIFEST)
    record_stored = body.get(KEY) if isinstance(body, dict) else None
    if not isinstance(record_stored, dict):
        raise not_sealed(
            f"{file} has no key `{KEY}`",
            help="an ordinary checkpoint is loaded with transformers' own `from_pretrained`",
        ).rejection()
    if type(record_stored.get("format")) is not int or record_stored["format"] > FORMAT:
        raise not_sealed(
            f"{file} has record format {record_stored.get('format')}, this effc reads {FORMAT}",
            help="install the effc that wrote it, or a newer one",
        ).rejection()
    base = record_stored.get("base")
    if not (isinstance(base, dict) and isinstance(base.get("model_type"), str) and "edits" in record_stored):
        raise not_sealed(f"{file} lacks the original config or the edits").rejection()
    if str(record_stored.get("dtype")) not in _DTYPES:
        raise not_sealed(f"{file} has another dtype than {', '.join(_DTYPES)}").rejection()
    versions = record_stored.get("versions", {})
    if not (isinstance(versions, dict) and all(isinstance(text, str) for text in versions.values())):
        raise not_sealed(f"{file} has versions of another form").rejection()
    return record_stored


def patch_save_pretrained(model: Any, compact_record: Mapping[str, Any]) -> None:
    """Have the model's own `save_pretrained` write folders that `effc.load` reads.

    The method is bound to the instance: the class stays transformers' own, so that generation, Trainer and
    PEFT know it. `push_to_hub(...)` goes through it too. Weights keep the names that they have in memory.
    """
    setattr(model.config, KEY, dict(compact_record))
    model.save_pretrained = types.MethodType(_save_pretrained_compact, model)


def _save_pretrained_compact(
    model: Any, save_directory: Any, *args: Any, save_original_format: bool = False, **options: Any
) -> None:
    if options.pop("push_to_hub", False):
        raise TypeError("save first, then call `push_to_hub` of the model: the config is sealed in between")
    plain = partial(type(model).save_pretrained, model, save_directory, *args)
    plain(save_original_format=save_original_format, **options)
    if (Path(save_directory) / CONFIG).is_file():
        lock_config_to_effc(Path(save_directory))
