"""Detection of folders of the target `rttc`, for every folder before anything of theirs is imported."""

from pathlib import Path

NAME = "app.json"


def is_app(path: str) -> bool:
    return (Path(path) / NAME).is_file()
