"""A transformers model in memory, as a folder in the cache that is named by the hash of its weights."""

import copy
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...core.cache import canonical_json_sha256, tensor_hash
from ...core.hashes import sha256_of_file
from ...core.options import invalid_option
from ...core.quantity import with_article

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "models"  # in the cache


def merged_model_or_reject(model: Any) -> "PreTrainedModel":
    """The model itself; of one that peft wraps, a copy with its adapters merged. Raises Reject (bad-option)."""
    from transformers import PreTrainedModel

    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        merge = getattr(copy.deepcopy(model), "merge_and_unload", None)
        if merge is None:
            fact = f"`model` has adapters of {type(model).__name__} that can't be merged into its weights"
            raise invalid_option(
                fact, help="adapters such as LoRA's can; or pass the model that they are on"
            ).rejection()
        model = merge()
    if not isinstance(model, PreTrainedModel):
        help = "pass a PreTrainedModel, also wrapped by peft; in a recipe, `module(...)` takes other modules"
        raise invalid_option(
            f"`model` is {with_article(type(model).__name__)}, which has no checkpoint of its own", help=help
        ).rejection()
    if getattr(model, "_hf_peft_config_loaded", False):
        help = "wrap the model by `peft.get_peft_model`, or merge the adapters into it"
        raise invalid_option("`model` has adapters of `add_adapter`, which are in no checkpoint", help=help).rejection()
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        help = "load it without the meta device, and without a `device_map` that leaves weights on disk"
        raise invalid_option("`model` has weights on the meta device, which holds no numbers", help=help).rejection()
    return model


def save_in_cache(model: "PreTrainedModel", tokenizer: Any, cache_dir: Path) -> Path:
    """The checkpoint of a model with its tokenizer, written where the cache lacks it; the model stays as it is.

    Raises Reject (bad-option) where transformers can't save it.
    """
    from .checkpoint import without_library_logs

    models = cache_dir / FOLDER
    models.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=models, prefix=".") as draft, without_library_logs():
        folder = Path(draft, "model")
        try:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            checkpoint = models / _identity(model, folder) / "model"
            if not checkpoint.is_dir():
                saved = copy.copy(model)  # transformers notes dtype and class in the config of what it saves
                saved.config = copy.deepcopy(model.config)
                saved.save_pretrained(folder)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            # The caller's classes run here: a config or a tokenizer that can't be written raises any of them.
            fact = f"`model` and `tokenizer` can't be saved: {type(error).__name__}: {error}"
            raise invalid_option(fact, help="pass what `save_pretrained` of transformers writes").rejection() from error
        if not checkpoint.is_dir():
            checkpoint.parent.mkdir(exist_ok=True)
            try:
                os.rename(folder, checkpoint)
            except OSError:  # another process was quicker
                if not checkpoint.is_dir():
                    raise
    return checkpoint


def _identity(model: "PreTrainedModel", tokenizer_folder: Path) -> str:
    """sha256 over class, configs, weights and files of the tokenizer."""
    paths = sorted(f for f in tokenizer_folder.rglob("*") if f.is_file())
    files = {f.relative_to(tokenizer_folder).as_posix(): sha256_of_file(f) for f in paths}
    weights = {name: tensor_hash(tensor) for name, tensor in model.state_dict().items()}
    configs: list[Any] = [model.config, *([model.generation_config] if model.can_generate() else [])]
    return canonical_json_sha256(
        [type(model).__name__, [c.to_json_string(use_diff=False) for c in configs], weights, files]
    )
