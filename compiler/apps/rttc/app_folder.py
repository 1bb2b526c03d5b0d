"""Which folders are of the target `rttc`: asked of every folder before anything of theirs is imported."""

from pathlib import Path

NAME = "app.json"


def is_app(place: str) -> bool:
    return (Path(place) / NAME).is_file()
