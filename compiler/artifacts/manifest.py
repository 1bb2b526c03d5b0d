"""Manifest of an artifact: `manifest.json`, and `measures.json` for what differs from run to run.

Without a manifest nothing loads, and it is written last. `manifest.json` is deterministic: its sha256 is the
artifact's hash, and it holds the hash of every other file. Measured values, outcomes, worst differences, the
machine and the time go into `measures.json`, which no hash covers; neither is `README.md`, so that a person
may edit the model card, nor `sbom.json` (packages of the machine), nor `model.sig` and
`signatures.json` (which sign the manifest).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject
from ...dsl.syntax.json_types import from_json
from ...dsl.syntax.render import shorten_for_message, without_line_breaks
from ..core.json_errors import reject_on_error
from ..core.safe_read import MANIFEST, irregular_file, read_json, refuse_irregular_file
from .form_losses import Account
from .manifest_form import Finite, Profile, check_manifest_form

FORMAT = 1
NAME = "manifest.json"
MEASURES = "measures.json"
CARD = "README.md"
SBOM = "sbom.json"
SIGNATURES = "signatures.json"
BUNDLE = "model.sig"
UNHASHED = frozenset({NAME, MEASURES, CARD, SBOM, SIGNATURES, BUNDLE})

no_artifact = Fault(
    "no-artifact", "A path holds no effc artifact, or one whose manifest was never written.", exit="environment"
)
artifact_newer = Fault(
    "artifact-newer", "An artifact was written in a format that this effc does not know.", exit="environment"
)
artifact_broken = Fault(
    "artifact-broken", "The manifest of an artifact is not what an effc writes.", exit="environment"
)
artifact_edited = Fault(
    "artifact-edited",
    "A file of an artifact is missing, is new or has other content than its manifest records.",
    exit="environment",
)

_REMEDY = "compile the artifact again"


@dataclass(frozen=True)
class Measure:
    """One metric of the original and of the compiled model.

    ratio     compiled / original
    spread    of a timed one, the smallest and the largest ratio of a round
    interval  of one over rows of data: 95 % interval of the ratio, or of `compiled` where there is no ratio
    untimed   why a clock could not read it
    """

    metric: str  # as the recipe spells it: "perplexity(heldout)"
    unit: str
    original: float | None
    compiled: float | None
    ratio: float | None = None
    better: str = "lower"
    spread: tuple[float, float] | None = None
    interval: tuple[float, float] | None = None
    untimed: str = ""


@dataclass(frozen=True)
class Expectation:
    """A bound of the recipe and what came of it: "holds", "fails", "undecided" or "skipped"."""

    text: str
    value: float | None
    limit: str
    outcome: str
    line: int = 0  # of the recipe; 0 where it has none
    note: str = ""

    @property
    def is_uncertain(self) -> bool:
        return self.outcome == "holds" and self.note.startswith("not certain")


@dataclass(frozen=True)
class Check:
    """A comparison of outputs; `worst` is the largest absolute difference that was seen."""

    what: str
    worst: float
    tolerance: float
    reason: str = ""  # why the tolerance is what it is

    @property
    def holds(self) -> bool:
        return self.worst <= self.tolerance  # false for nan


@dataclass(frozen=True)
class Manifest:
    """
    kind          the target that wrote it: "hf"
    name          of the pipeline
    effc          version of the compiler
    recipe        {"name", "text", "params", "variant", "resolved"}: text and defaults as they were applied
    lock          {"inputs": {label: identity}, "versions": {"python", "torch", ...}}; no paths, no times
    steps         what was removed and why, in order: {"name", "word", "args", "changes": [...], ...}
    edits         `Edits.to_json()`
    members       of a front, in the recipe's order: {"name", "measures": [(metric, value, unit, better)],
                  "steps": names of those that led to it, "edits", "profile"}
    profile       {"before", "after"}: branches and widths of layers, as in compiler/analysis/planning/layer_profile.py
    notes         what the target wants known: forms it couldn't write, with the reason
    files         relative path -> (bytes, sha256) of every file but `UNHASHED`

    The rest is volatile and goes to measures.json: measures, expectations, checks, accounts, machine (fingerprint),
    run ({"created": ISO time, "seconds": {stage: s}, ...}).
    """

    kind: str
    name: str = ""
    effc: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    lock: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()
    edits: Any = None
    profile: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    measures: tuple[Measure, ...] = ()
    expectations: tuple[Expectation, ...] = ()
    checks: tuple[Check, ...] = ()
    accounts: tuple[Account, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The deterministic part."""
        return {"format": FORMAT, **{n: getattr(self, n) for n in _STEADY}}

    def measures_json(self) -> dict[str, Any]:
        """The volatile part."""
        return {"format": FORMAT, **{n: _records_to_json(getattr(self, n)) for n in _VOLATILE}}

    @staticmethod
    def from_json(data: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> "Manifest":
        """Raises KeyError, TypeError, ValueError or AttributeError on data of another form."""
        measured = measured or {}
        check_manifest_form(data, measured, _RECORDS)
        body = {n: data[n] for n in _STEADY if n != "members"} | {"members": data.get("members", ())}
        body |= {n: measured[n] for n in ("machine", "run") if n in measured}
        body |= {n: tuple(kind(**v) for v in measured.get(n, ())) for n, kind in _RECORDS.items()}
        body |= {
            "steps": tuple(body["steps"]),
            "notes": tuple(body["notes"]),
            "members": _checked_members(body["members"]),
            "files": {check_inner_file_name(n): (int(size), str(sha)) for n, (size, sha) in body["files"].items()},
        }
        return Manifest(**body)

    def with_measures(self, **volatile: Any) -> "Manifest":
        assert set(volatile) <= set(_VOLATILE), f"{sorted(volatile)} are not all volatile"
        return replace(self, **volatile)


_RECORDS = {"measures": Measure, "expectations": Expectation, "checks": Check, "accounts": Account}
_VOLATILE = (*_RECORDS, "machine", "run")
_STEADY = tuple(f.name for f in fields(Manifest) if f.name not in _VOLATILE)


def _records_to_json(value: Any) -> Any:
    """Records as dicts; JSON has no nan and no infinity, so they become null."""
    if isinstance(value, tuple):
        return [_records_to_json(asdict(v) if is_dataclass(v) and not isinstance(v, type) else v) for v in value]
    if isinstance(value, Mapping):
        return {k: _records_to_json(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


_STEP = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_Printable = Annotated[str, str.isprintable]
_MEMBER = {
    "measures": Annotated[tuple[tuple[_Printable, Finite, _Printable, Literal["lower", "higher"]], ...], bool],
    "profile": Mapping[str, Profile],
    "steps": tuple[str, ...],
}


def _checked_members(data: Any) -> tuple[Mapping[str, Any], ...]:
    """Points of a front, each named once: every name is a folder that is read."""
    members = tuple(map(_checked_member, data))
    if len({member["name"] for member in members}) < len(members):
        raise ValueError("two points have one name")
    return members


def _checked_member(data: Any) -> Mapping[str, Any]:
    """A point of a front, whose name becomes a path and whose words go to a terminal."""
    if not (isinstance(data, Mapping) and isinstance(data["name"], str) and _STEP.fullmatch(data["name"])):
        raise ValueError("a point has a name that no step could have")
    for field_name, kind in _MEMBER.items():
        from_json(data[field_name], kind, f"members.{data['name']}.{field_name}")
    return data


def check_inner_file_name(name: str) -> str:
    """A path of a file inside of an artifact. Raises ValueError for one that leads out of it."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or "\\" in name:
        raise ValueError(f"the file name {name} leads outside the artifact")
    return name


def readable_json_bytes(data: Mapping[str, Any]) -> bytes:
    """JSON as files of an artifact hold it: one spelling per value, and readable."""
    return (json.dumps(data, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_manifest(artifact: Path) -> Manifest:
    """The manifest of an artifact folder. Says nothing of the files: `verify_files` does."""
    data = _read_manifest_json(artifact / NAME)
    manifest = _manifest_from_json(artifact / NAME, data)
    if not (artifact / MEASURES).is_file():
        return manifest
    return _manifest_from_json(artifact / MEASURES, data, _read_manifest_json(artifact / MEASURES))


def _manifest_from_json(file: Path, data: Any, measured: Any = None) -> Manifest:
    """A manifest of JSON. Raises Reject (artifact-broken), which names `file`, where that is of another form."""
    with reject_on_error(artifact_broken, f"{file} lacks a field or has one of another form", _REMEDY):
        return Manifest.from_json(data, measured)


def _enclosing_artifact_hint(folder: Path) -> str:
    """Suggestion for a folder without a manifest: it may lie inside an artifact."""
    around = next((f for f in list(folder.parents)[:2] if (f / NAME).is_file()), None)
    if around is None or not folder.is_dir():
        return "name the folder that `effc compile` wrote"
    if folder.parent != around:
        return f"it is a point of {around}: name that, or take it out with `effc pick {around} --point {folder.name}`"
    return f"it lies in the artifact {around}: name that"


def _read_manifest_json(file: Path) -> Any:
    try:
        data = read_json(file, MANIFEST, file.parent)
    except (FileNotFoundError, NotADirectoryError) as error:
        fact = f"{file.parent} has no {file.name}" if file.parent.exists() else f"there is no folder `{file.parent}`"
        raise no_artifact(fact, help=_enclosing_artifact_hint(file.parent)).rejection() from error
    except OSError as error:
        raise no_artifact(f"{file} can't be read: {error.strerror}").rejection() from error
    except UnicodeDecodeError as error:
        raise artifact_broken(
            f"{file} is not text: byte {error.start} is no UTF-8", help=_REMEDY
        ).rejection() from error
    except (ValueError, RecursionError) as error:
        raise artifact_broken(f"{file} is not JSON: {error}", help=_REMEDY).rejection() from error
    number = data.get("format") if isinstance(data, dict) else None
    if type(number) is not int or number < 1:
        raise artifact_broken(f"{file} states no format version", help=_REMEDY).rejection()
    if number > FORMAT:
        raise artifact_newer(
            f"{file} has format {number}, this effc reads up to {FORMAT}",
            help="install the effc that wrote it, or a newer one",
        ).rejection()
    return data


def verify_files(
    path: Path,
    manifest: Manifest | None = None,
    *,
    is_hashed: Callable[[str], bool] = lambda name: True,
    name_prefix: str = "",
    skipped_folders: Sequence[str] = (),
) -> None:
    """Reject unless the folder holds exactly the files that its manifest records.

    is_hashed         of files by relative path; of others sizes alone are compared
    name_prefix       checks one folder of the artifact only, "compact", or one file
    skipped_folders   folders that are not looked at, because nobody is about to read them
    """
    manifest = manifest or read_manifest(path)
    inside, outside = f"{name_prefix}/" if name_prefix else "", tuple(f"{folder}/" for folder in skipped_folders)

    def counts(name: str) -> bool:
        return (name == name_prefix or name.startswith(inside)) and not name.startswith(outside)

    recorded = {n: fact for n, fact in manifest.files.items() if counts(n)}
    present = {n: f for n, f in hashed_files(path).items() if counts(n)}
    faults = [_edited_file_diagnostic(path, n, "is missing") for n in sorted(recorded.keys() - present.keys())]
    faults += [
        _edited_file_diagnostic(path, n, "is not in the manifest") for n in sorted(present.keys() - recorded.keys())
    ]
    for name in sorted(recorded.keys() & present.keys()):
        size, sha = recorded[name]
        refuse_irregular_file(present[name], root=path)
        if (actual_size := present[name].stat().st_size) != size:
            faults.append(_edited_file_diagnostic(path, name, f"has {actual_size} bytes, the manifest records {size}"))
        elif is_hashed(name) and file_sha256(present[name]) != sha:
            faults.append(_edited_file_diagnostic(path, name, "has other content than when it was written"))
    if faults:
        raise Reject(*faults)


def _edited_file_diagnostic(artifact: Path, name: str, fact: str) -> Diagnostic:
    return artifact_edited(f"{artifact / name} {fact}", help="compile again, or fetch the artifact again")


def hashed_files(artifact: Path) -> dict[str, Path]:
    """The files that a hash covers, by relative path; dot files and Python's caches are none."""
    files = all_files(artifact)
    return {n: f for n, f in files.items() if n not in UNHASHED and not any(map(is_hidden, n.split("/")))}


def all_files(artifact: Path) -> dict[str, Path]:
    """Every file below a folder, by relative path. Raises Reject where a folder is linked or a file is irregular."""
    irregular = next(
        (f for f in artifact.rglob("*") if (f.is_symlink() and f.is_dir()) or not (f.is_file() or f.is_dir())), None
    )
    if irregular is not None:
        raise irregular_file(f"{irregular} is a linked folder, or no ordinary file", help=_REMEDY).rejection()
    return {f.relative_to(artifact).as_posix(): f for f in sorted(artifact.rglob("*")) if f.is_file()}


def is_hidden(part: str) -> bool:
    """Whether a name in a path keeps what lies there from being hashed and loaded."""
    return part.startswith(".") or part == "__pycache__"


def uncovered_files(artifact: Path) -> list[str]:
    """Files and folders of an artifact that no hash and no signature covers, by relative path."""
    hidden = (p.relative_to(artifact) for p in sorted(artifact.rglob("*")) if is_hidden(p.name))
    return [p.as_posix() for p in hidden if not any(map(is_hidden, p.parts[:-1]))]


def uncovered_files_text(artifact: Path) -> str:
    """Sentence about the files and folders of an artifact that no hash and no signature covers; "" without any."""
    names = uncovered_files(artifact)
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    listing = without_line_breaks(shorten_for_message(", ".join(names[:3])))
    return f"no hash and no signature covers {listing}{more}, and effc opens none of them"


def file_sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(artifact: Path) -> dict[str, tuple[int, str]]:
    return {n: (f.stat().st_size, file_sha256(f)) for n, f in hashed_files(artifact).items()}


def artifact_hash(artifact: Path) -> str:
    """One hash for all that a compile decides: files, recipe, lock, edits; not measures, card or times."""
    read_manifest(artifact)
    return file_sha256(artifact / NAME)
