"""Detection of folders of the target `rttc`, for every folder before anything of theirs is imported."""

from pathlib import Path

NAME = "app.json"


def is_rttc_app_folder(folder: str) -> bool:
    return (Path(folder) / NAME).is_file()
