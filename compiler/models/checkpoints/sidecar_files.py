"""Files of a checkpoint folder besides weights and config: tokenizer, chat template, generation config, licence."""

import shutil
from pathlib import Path

from torch import nn

from ...core.safe_read import TOKENIZER, refuse_irregular_file
from .model_folder import COMPANIONS, TOKENIZER_FILES
from .origin import Origin
from .pretrained import pretrained
from .sentence_encoder import MODULES, module_paths
from .source_files import link_root_of
from .tokenizer_checks import TEMPLATES

# Of a folder of sentence-transformers: what it says, and what becomes of the transformer's states.
_SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_MODULE_FILES = ("config.json", "model.safetensors")


def copy_sidecar_files(model: nn.Module, origin: Origin, folder: Path) -> None:
    """Tokenizer, chat template, generation config and licence, byte for byte where the origin has files."""
    if origin.folder:
        for file in (*(origin.folder / n for n in COMPANIONS), *sorted(origin.folder.glob(TEMPLATES))):
            if file.is_file():
                _copy(file, folder / file.relative_to(origin.folder), link_root_of(origin.folder))
        _copy_sentence_transformers_files(origin.folder, folder)
    if not any((folder / n).exists() for n in TOKENIZER_FILES) and (tokenizer := origin.tokenizer()) is not None:
        tokenizer.save_pretrained(folder)
    hf_model = pretrained(model)
    if not (folder / "generation_config.json").exists() and hf_model.can_generate():
        hf_model.generation_config.save_pretrained(folder)


def sidecar_bytes(origin: Origin) -> int:
    """Bytes of the files that `copy_sidecar_files` copies of an origin's folder, and of its config."""
    if not origin.folder:
        return 0
    files = (*(origin.folder / n for n in ("config.json", *COMPANIONS)), *origin.folder.glob(TEMPLATES))
    return sum(file.stat().st_size for file in files if file.is_file())


def _copy_sentence_transformers_files(origin: Path, folder: Path) -> None:
    """Copy the files that make a folder one of sentence-transformers; the transformer itself is in the folder."""
    if not (origin / MODULES).is_file():
        return
    for name in _SENTENCES:
        if (origin / name).is_file():
            _copy(origin / name, folder / name, link_root_of(origin))
    for path in module_paths(origin):
        for name in _MODULE_FILES:
            if (origin / path / name).is_file():
                _copy(origin / path / name, folder / path / name, link_root_of(origin))


def _copy(file: Path, target: Path, root: Path) -> None:
    """A file's bytes; a link that leads out of the model would bring somebody else's into the artifact."""
    refuse_irregular_file(file, TOKENIZER, root)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
