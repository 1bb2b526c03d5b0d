"""What a checkpoint folder says beside weights and config: tokenizer, chat template, generation config, licence."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from .folder import TOKENIZER_FILES
from .origin import Origin
from .sentences import MODULES, module_paths

# Beside the tokenizer: what a checkpoint folder has to say that weights and config don't.
_COMPANIONS = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
# Of a folder of sentence-transformers: what it says, and what becomes of the transformer's states.
_SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_MODULE_FILES = ("config.json", "model.safetensors")


def companions(model: PreTrainedModel, origin: Origin, folder: Path) -> None:
    """Tokenizer, chat template, generation config and licence, byte for byte where the origin has files."""
    found = [f for f in (origin.folder / n for n in _COMPANIONS) if f.is_file()] if origin.folder else []
    for file in found:
        shutil.copyfile(file, folder / file.name)
    if origin.folder:
        _sentence_modules(origin.folder, folder)
    templates = origin.folder / "additional_chat_templates" if origin.folder else None
    if templates and templates.is_dir():
        shutil.copytree(templates, folder / templates.name)
    if not any(f.name in TOKENIZER_FILES for f in found) and (tokenizer := origin.tokenizer()) is not None:
        tokenizer.save_pretrained(folder)
    if not (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config.save_pretrained(folder)


def _sentence_modules(origin: Path, folder: Path) -> None:
    """What makes a folder one of sentence-transformers, byte for byte; the transformer itself lies in the folder."""
    if not (origin / MODULES).is_file():
        return
    for name in _SENTENCES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    for path in module_paths(origin):
        for name in _MODULE_FILES:
            if (origin / path / name).is_file():
                (folder / path).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(origin / path / name, folder / path / name)
