"""A family on disk: its weights once, and which choices of it are points; a choice is cut out of that later."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ...core.json_errors import first_line
from ...core.safe_read import CONFIG, MALFORMED, read_json
from ...core.sealed_json import cache_damaged
from ...ir.capture.capture import capture
from ...ir.program import Program
from ...models.checkpoints.origin import Origin
from .family import Family
from .form_checks import assert_family_fits_program

WEIGHTS, FAMILY, TENSORS = "shared/model", "family.json", "family.safetensors"


def write_family_without_weights(
    family: Family, choices_by_point: Mapping[str, Mapping[str, int]], destination: Path
) -> None:
    """Write a family but its program's weights; `choices_by_point` are the points by name.

    What training changed in the weights is in those, so that nothing of it is written here.
    """
    body = {**family.to_json(), "base": "", "weights": [], "losses": [], "learned": bool(family.weights)}
    points = {name: dict(choice) for name, choice in choices_by_point.items()}
    (destination / FAMILY).write_text(json.dumps({"family": body, "points": points}), encoding="utf-8")
    tensors = {name: t.contiguous() for name, t in family.stored.items() if name not in family.weights}
    if tensors:
        save_file(tensors, destination / TENSORS)


def load_and_cut_program_of_point(folder: Path, point_name: str, origin: Origin) -> Program:
    """The program of a point: the shared weights, loaded as `origin` has it, cut to the point's choice.

    Raises Reject (cache-damaged) where files don't fit each other: they may come from anybody.
    """
    try:
        body = read_json(folder / FAMILY, CONFIG)
        choice, family = body["points"][point_name], _load_family(folder, body["family"], origin)
        known = {dim.name: dim.values for dim in family.space.dims}
        assert choice.keys() == known.keys(), "a point of another family"
        assert all(type(v) is int and v in known[d] for d, v in choice.items()), "a point beyond the dimensions"
    except (*MALFORMED, AssertionError, OSError) as error:
        raise cache_damaged(
            f"{folder / FAMILY} does not fit the model beside it: {type(error).__name__}: {first_line(error)}",
            help="compile the recipe again, or get the artifact again",
        ).rejection() from error
    return family.cut_program_to_choice(choice)


def _load_family(folder: Path, family_json: Mapping[str, Any], origin: Origin) -> Family:
    tensors = {}
    if (folder / TENSORS).is_file():
        with safe_open(folder / TENSORS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    program = capture(origin.load())
    family = Family.from_json_assigning_weights(family_json, program, tensors)
    assert_family_fits_program(family)
    if family_json["learned"]:  # its weights are those of the model
        family.weights = dict(program.model.named_parameters())
    return family
