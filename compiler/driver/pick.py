"""One model out of a front that was emitted: an artifact of its own, without training and without the recipe."""

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...dsl.syntax.diagnostics import Fault
from ...kernels.levels import NAMES, runs_kernels_of_level
from ..artifacts.artifact import artifact_draft, refuse_output_path
from ..artifacts.front_kinds import members_with_interleaved_times, read_front_manifest
from ..artifacts.load import POINTS, load
from ..artifacts.load import checkpoint_folder_by_point as points
from ..artifacts.manifest import Check, Manifest, verify_files
from ..artifacts.verify import verify_forms
from ..core.cache import default_cache_folder
from ..core.environment import cpu_flags
from ..core.events import Listener, StageBegan, StageEnded, announcing_stage, listening_with, silent
from ..core.fingerprint import machine_facts
from ..core.quantity import measurement_text
from ..core.settings import Settings
from ..models.checkpoints.model_folder import origin_of_folder
from ..plugin.context import Context
from ..plugin.registry import Registry
from ..targets.hf import FORMS as CHECKPOINTS
from ..targets.hf import write_stock_or_compact
from ..transforms.supernet import shared_weights
from .models import model_errors_as_diagnostics, refuse_without_tokenizer
from .point_limits import Limit, Measures, split_limit_texts
from .point_limits import parse_limits as limits_of
from .point_times import undecided_reason_by_point

if TYPE_CHECKING:
    from torch import nn

no_such_point = Fault("no-such-point", "A front has no point of that name or number.", exit="usage")
none_fits = Fault(
    "none-fits",
    "No point of a front keeps the limits that were asked for.\n\n"
    "The points and what they measure stand in the artifact's README.md; `effc inspect` lists them.",
    exit="gate",
)
measured_elsewhere = Fault(
    "measured-elsewhere",
    "A point is picked for a machine, by latencies that were measured on another one.\n\n"
    "`effc pick --on PROFILE` names a profile of the recipe that the front was compiled from, and takes its measures "
    "for what they are: of the machine, and the number of threads, that they were taken with.",
    exit="environment",
)
into_itself = Fault("into-itself", "A point would be picked into the front that it comes from.", exit="usage")

# The front may come from anybody: plain transformers, which believes what a config says, opens none of it.
_FORMS = tuple(replace(form, opens="effc") for form in CHECKPOINTS)

SHARD = 5_000_000_000  # bytes of a weights file, at most


def copy_point(
    front_folder: Path,
    destination: Path,
    *,
    point_name: str = "",
    limits: tuple[Limit, ...] = (),
    profile_name: str = "",
    force: bool = False,
    on_event: Listener = silent,
) -> tuple[str, Manifest]:
    """Copy one point of a front to `destination`, and compare what a fresh process computes from the copy.

    point_name          its name, or its number in the order of the recipe, from 1
    limits         or what it must keep: the best at the first measure that does is taken
    profile_name   a profile of the front's recipe that its machine has to be; "" where that doesn't matter
    return         the point's name, and the manifest of the new artifact
    """
    front = read_front_manifest(front_folder)
    if profile_name:
        refuse_profile_mismatch(front, profile_name)
    if (
        front_folder.resolve() in (destination.resolve(), *destination.resolve().parents)
        or destination.resolve() in front_folder.resolve().parents
    ):
        raise into_itself(
            f"{destination} and the front {front_folder} lie inside one another", help="name another folder"
        ).rejection()
    refuse_output_path(destination, force)
    name = _chosen_point(front, point_name, limits)
    start = time.monotonic()
    on_event(StageBegan("pick", name))
    with listening_with(on_event):
        with announcing_stage("reading and checking files"):
            verify_files(front_folder, front, name_prefix=f"{POINTS}/{name}" if _point_has_files(front, name) else "")
        with artifact_draft(destination, force) as draft:
            write_point = _copy_and_load_point if _point_has_files(front, name) else _extract_and_save_point
            model = write_point(front_folder, front, name, draft.folder)
            with model_errors_as_diagnostics(str(draft.folder)):
                checks = verify_forms(draft.folder, model, _FORMS)
            manifest = draft.publish(_manifest_of_point(front, name, checks))
    on_event(StageEnded("pick", time.monotonic() - start))
    return name, manifest


def point_folder_or_copy(
    path: Path, selection: str, *, needs_tokenizer: bool = False, on_note: Callable[[str], None] = lambda note: None
) -> Path:
    """The folder of one point of a front that was emitted: by name, number or limits, "params=1.6M,bytes=6MiB".

    A point of weights that are shared is cut out first, into a folder that is there until this process ends.

    needs_tokenizer     Reject (no-words) of weights that are shared and have no tokenizer beside them
    on_note             takes sentences on limits that were timed too noisily to decide
    """
    limits = limits_of(split_limit_texts(selection)) if "=" in selection else ()
    front = read_front_manifest(path)
    name = _chosen_point(front, "" if limits else selection, limits)
    for note in undecided_reason_by_point(front, measures_by_point(front), limits).values():
        on_note(note)
    if _point_has_files(front, name):
        return path / POINTS / name
    if needs_tokenizer:
        refuse_without_tokenizer(path / shared_weights.WEIGHTS, str(path))
    scratch = tempfile.mkdtemp(prefix="effc-pick-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    copy_point(path, Path(scratch, name), point_name=name)
    return Path(scratch, name)


def refuse_profile_mismatch(front: Manifest, profile_name: str) -> None:
    """Reject a front whose measures are not of the machine that a profile of its recipe describes."""
    profiles = front.recipe.get("resolved", {}).get("profiles", {})
    if profile_name not in profiles:
        raise no_such_point(
            f"the recipe of the front has no profile `{profile_name}`",
            help=f"it has {', '.join(profiles)}" if profiles else "leave `--on` out, or declare it in the recipe",
        ).rejection()
    profile, measured_on = profiles[profile_name], front.machine
    isa, threads, had = profile.get("isa", NAMES[0]), profile.get("threads"), measured_on.get("isa")
    reason = ""
    if isa not in NAMES or had not in NAMES:
        is_supported = measured_on.get("cpu") == machine_facts().get("cpu") and isa in cpu_flags()
        reason = "" if is_supported else f"nothing says whether {measured_on.get('cpu', 'the machine')} has {isa}"
    elif not runs_kernels_of_level(had, isa):
        reason = f"{profile_name} asks for {isa}, and {measured_on.get('cpu', 'the machine')} has {had}"
    elif threads and threads != measured_on.get("threads"):
        reason = f"{profile_name} asks for {threads} threads, and {measured_on.get('threads')} were used"
    if reason:
        raise measured_elsewhere(
            f"what the front measured is of another machine than {profile_name}: {reason}",
            help="compile the recipe on such a machine, with `--threads` as the profile says, or leave `--on` out",
        ).rejection()


def _chosen_point(front: Manifest, point_name: str, limits: tuple[Limit, ...]) -> str:
    names = [str(member["name"]) for member in front.members]
    return _resolve_point_name(point_name, names) if point_name else _best_fitting_point(front, limits)


def _resolve_point_name(spelled_name: str, names: list[str]) -> str:
    if spelled_name in names:
        return spelled_name
    if spelled_name.isdigit() and 1 <= int(spelled_name) <= len(names):
        return names[int(spelled_name) - 1]
    raise no_such_point(f"there is no point `{spelled_name}`", help=f"there are {', '.join(names)}").rejection()


def _best_fitting_point(front: Manifest, limits: tuple[Limit, ...]) -> str:
    measures = measures_by_point(front)
    fit = [name for name in measures if all(limit.is_met(measures[name]) for limit in limits)]
    if not fit:
        nearest = min(measures, key=lambda n: max(limit.relative_excess(measures[n]) for limit in limits))
        values_text = ", ".join(
            f"{name} {measurement_text(value, unit)}" for name, (value, unit, _) in measures[nearest].items()
        )
        unknown = undecided_reason_by_point(front, measures, limits).get(nearest, "")
        raise none_fits(
            "no point keeps what was asked for",
            note=f"the nearest is `{nearest}`: {values_text}" + (f"; {unknown}" if unknown else ""),
            help=f"loosen a limit, or take it with `--point {nearest}`",
        ).rejection()
    first = next(iter(measures[fit[0]]))
    return min(fit, key=lambda n: measures[n][first][0] * (1 if measures[n][first][2] == "lower" else -1))


def measures_by_point(front: Manifest) -> dict[str, Measures]:
    """Measures of each point: first those of the front, then those of the report."""
    known: dict[str, Measures] = {}
    for member in members_with_interleaved_times(front):
        facts = {metric: (value, unit, better) for metric, value, unit, better in member["measures"]}
        known[member["name"]] = facts
        for row in front.measures:
            metric, of, name = row.metric.rpartition(" of ")
            if of and name == member["name"] and row.compiled is not None:
                facts.setdefault(metric, (row.compiled, row.unit, row.better))
    return known


def _point_has_files(front: Manifest, point_name: str) -> bool:
    """Whether a point has weights of its own, not those that all points share."""
    return any(file.startswith(f"{POINTS}/{point_name}/") for file in front.files)


def _copy_and_load_point(front_folder: Path, front: Manifest, point_name: str, draft: Path) -> "nn.Module":
    """Copy the files of a point; the model that they hold."""
    for file in (f for f in front.files if f.startswith(f"{POINTS}/{point_name}/")):
        copy = draft / Path(file).relative_to(f"{POINTS}/{point_name}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(front_folder / file, copy)
    form = dict(points(front_folder, front))[point_name]
    with model_errors_as_diagnostics(str(form)):
        return load(form, check="size", kernels=False)


def _extract_and_save_point(front_folder: Path, front: Manifest, point_name: str, draft: Path) -> "nn.Module":
    """Cut a point out of weights that all points share, and write it; the model."""
    settings, folder = Settings(default_cache_folder()), front_folder / shared_weights.WEIGHTS
    origin = origin_of_folder(folder, str(folder), "auto", settings)
    with model_errors_as_diagnostics(str(folder)), announcing_stage("cutting the point out"):
        program = shared_weights.load_and_cut_program_of_point(front_folder, point_name, origin)
    ctx = Context.without_recipe(settings, front_folder, Registry(), origin, draft)
    write_stock_or_compact(program, draft, ctx, SHARD)
    return program.model


def _manifest_of_point(front: Manifest, name: str, checks: tuple[Check, ...]) -> Manifest:
    """Manifest of a point as an artifact of its own."""
    member, suffix = next(m for m in front.members if m["name"] == name), f" of {name}"
    steps = tuple(s for s in front.steps if s.get("name") in member["steps"])
    rows = [m for m in front.measures if m.metric.endswith(suffix)]
    measures = tuple(replace(m, metric=m.metric.removesuffix(suffix)) for m in rows)
    return replace(
        front,
        kind="hf",
        steps=steps,
        edits=member["edits"],
        profile=member["profile"],
        members=(),
        notes=(f"Point `{name}` of a front.",),
        files={},
        expectations=(),
    ).with_measures(measures=measures, checks=checks, machine=front.machine, run=front.run, expectations=())
