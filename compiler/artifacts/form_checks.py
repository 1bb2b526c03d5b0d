"""Each form of an artifact read for what it is, without making a model of it."""

from pathlib import Path

from .load import POINTS, checkpoint_folder_by_point, loadable_forms, target_class, target_class_of_folder
from .manifest import Manifest, verify_files


def check_forms_and_list_paths(artifact: Path, manifest: Manifest) -> list[str]:
    """The forms that an artifact has, each read by its target's rules for files that come from anybody.

    Raises Reject where a file is not the one of the manifest, or a form holds what effc would not take.
    """
    verify_files(artifact, manifest)
    target = target_class(manifest.kind)
    present = [form for form in loadable_forms(manifest.kind) if (artifact / form).is_dir()]
    for form in present:
        target.check_folder(artifact / form)
        _check_tokenizer_and_generation(artifact / form)
    for name, folder in checkpoint_folder_by_point(artifact, manifest):
        target_class_of_folder(folder, None).check_folder(folder)
        _check_tokenizer_and_generation(folder)
        present.append(f"{POINTS}/{name}/{folder.name}")
    return present


def _check_tokenizer_and_generation(folder: Path) -> None:
    """Generation values and tokenizer beside the weights of a form or of its base, read as loading does."""
    from ..models.checkpoints.generation_config import read_generation_config
    from ..models.checkpoints.model_folder import load_tokenizer, tokenizer_files_if_complete

    base = folder.parent / "base"
    for path in (folder, base, base / "compact"):
        read_generation_config(path)
        if tokenizer_files_if_complete(path):
            load_tokenizer(path, str(path))
