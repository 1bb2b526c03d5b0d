"""Artifacts of kind `hf`, and folders that such models saved again, to ordinary transformers models."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ...dsl.checker.profiles import MAX_THREADS
from ...dsl.syntax.diagnostics import Fault
from ..core import options
from ..core.device import refuse_unusable_device
from ..core.events import Listener, Warned, silent
from ..core.warned import other_versions
from ..plugin.registry import Registry
from ..plugin.target import LoadRequest
from .manifest import NAME, Manifest, artifact_broken, no_artifact, read_manifest, verify_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..plugin.target import Target

POINTS = "points"  # of a front: the folder that has one for each point

other_kind = Fault("other-kind", "An artifact of this target is not loaded as a model.", exit="usage")


class LoadOptions(TypedDict, total=False):
    """Options of `load`, as its page documents them; `device_map` is `device` as transformers spells it."""

    device: Any
    device_map: Any
    dtype: "torch.dtype | str | None"
    check: Literal["sha256", "size", "auto"]
    threads: int | None
    max_sequences: int | None
    batch_invariant: bool
    kernels: bool
    mapped: bool | None
    base: Any
    signed_by: Sequence[str] | None
    on_event: Listener


def load(
    path: str | Path,
    *,
    device: Any = None,
    dtype: "torch.dtype | str | None" = None,
    check: Literal["sha256", "size", "auto"] = "auto",
    threads: int | None = None,
    max_sequences: int | None = None,
    batch_invariant: bool = False,
    kernels: bool = True,
    mapped: bool | None = None,
    base: Any = None,
    signed_by: Sequence[str] | None = None,
    on_event: Listener = silent,
) -> "PreTrainedModel":
    """An ordinary `PreTrainedModel` in evaluation mode: it generates, trains and saves itself again.

    Of the target `pt2`, a module that computes what the model's forward did and no more; of `native`, `onnx`, `gguf`
    and `pt2` with a `context`, one that computes and generates by an engine (`compiler.runtimes.model.DecoderModel`);
    of `reft`, the base with its interventions.

    path        an artifact (its compact form comes first), one of its forms, or what a loaded model saved
    device      moved there after loading, "auto" to an accelerator; weights are mapped from disk on the CPU
    dtype       of floating weights, or its name; as stored by default, and with "auto"
    check       what of the files is compared with the manifest; "size" skips reading them all, "auto" skips the weights
                of `native`, whose checksums the engine compares
    threads     that run the native engine; as many as torch has by default
    max_sequences
                that the native engine keeps at once; 16 by default
    batch_invariant
                the native engine gives the same logits to the bit whatever other sequences it computes in a call
    kernels     state-space scans run on effc's kernels where those are compiled; False: where the recipe says so
    mapped      weights of the native engine stay on disk, mapped and checked in place: no copy is made, and processes
                share them; the files must stay as they are, and computing is slower where the system caches files in
                small pages. By default those that take more than a quarter of the machine's memory
    base        of the target `reft`: the model that interventions are put onto, or its folder; by default the one that
                the artifact names
    signed_by   public keys (`p256:...`, or files with one), one of which must have signed the artifact; every
                hash is then compared
    on_event    hears a sentence where versions differ from those that wrote it

    Raises Reject: `bad-option` where one of these means nothing.
    """
    stored = isinstance(dtype, str) and dtype == "auto"  # as transformers spells it
    values = {"path": path, "device": device, "dtype": None if stored else dtype, "check": check, "threads": threads}
    values |= {
        "max_sequences": max_sequences,
        "batch_invariant": batch_invariant,
        "kernels": kernels,
        "mapped": mapped,
        "on_event": on_event,
    }
    return _load_checked(base=base, **options.apply_option_rules({**values, "signed_by": signed_by}, _option_rules()))


def _load_checked(
    path: Path,
    check: str,
    device: str | None,
    signed_by: Sequence[str] | None,
    on_event: Listener,
    base: Any,
    **engine_options: Any,
) -> "PreTrainedModel":
    from ..ir.layers.linear import refuse_non_cpu_device_of_kernels

    if signed_by:
        verify_signature_and_files(path, signed_by)
    folder, manifest = locate_checkpoint_and_artifact(path)
    target = target_class_of_folder(folder, manifest[1] if manifest else None)
    if base is not None and not target.upon:
        raise other_kind(f"{folder} is a model, and goes onto no other", help="load it without `base`").rejection()
    if manifest:
        compares_hashes = check != "size" and not signed_by
        checksummed = target.checksummed_files if check == "auto" else ()
        verify_files(
            *manifest,
            is_hashed=lambda name: compares_hashes and name.rpartition("/")[2] not in checksummed,
            skipped_folders=_unopened_folders(*manifest, folder),
        )
    model, recorded = target.open(folder, LoadRequest(device=device, base=base, **engine_options))
    versions = manifest[1].lock.get("versions", {}) if recorded is None and manifest else recorded or {}
    for sentence in version_mismatch_notes(versions):
        on_event(Warned(other_versions(sentence)))
    if device is None:
        return model
    refuse_non_cpu_device_of_kernels(model, device)
    refuse_unusable_device(device)
    return model.to(device)


def _option_rules() -> dict[str, options.Rule]:
    from ...kernels.engine import MAX_SEQUENCES

    return {
        "path": options.path_rule,
        "device": options.optional_rule(options.checked_device_name),
        "dtype": options.optional_rule(options.checked_float_dtype),
        "check": options.choice_rule("sha256", "size", "auto"),
        "threads": options.optional_rule(options.integer_rule(1, MAX_THREADS)),
        "max_sequences": options.optional_rule(options.integer_rule(1, MAX_SEQUENCES)),
        "batch_invariant": options.boolean_rule,
        "kernels": options.boolean_rule,
        "mapped": options.optional_rule(options.boolean_rule),
        "on_event": options.listener_rule,
        "signed_by": options.optional_rule(options.text_list_option),
    }


def verify_signature_and_files(path: Path, keys: Sequence[str]) -> str:
    """The first of the public keys that signed the artifact which `path` is, or is a form or a point of.

    Every verb and `load` come here before they look at anything else of an artifact: only the files that a signature
    is of are read, then those of the manifest are compared with its hashes.
    Raises Reject: `unsigned-artifact` where none of the keys signed, `artifact-edited` where a file differs.
    """
    from .signature import find_valid_signer, unsigned

    artifact = artifact_of_form_or_point(path)
    if artifact is None:
        help = "compile it and sign what is emitted, or leave out --require-signature"
        raise unsigned(f"{path} is no artifact, and artifacts alone are signed", help=help).rejection()
    key = find_valid_signer(artifact, keys)
    verify_files(artifact)
    return key


def verify_artifact_files(path: Path) -> None:
    """Compare every file of the artifact that a path is, or is a form or a point of, with the manifest's hashes; of
    other folders nothing is known. Raises Reject (artifact-edited)."""
    artifact = artifact_of_form_or_point(path)
    if artifact is not None:
        verify_files(artifact)


def artifact_of_form_or_point(path: Path) -> Path | None:
    """The folder with the manifest that `locate_checkpoint_and_artifact` goes by."""
    candidates = [path]
    if target_name_of_form(path.name):
        candidates.append(path.parent)
    if path.parent.name == POINTS and not path.name.startswith("."):  # hidden files have no hash
        candidates.append(path.parents[1])
    return next((folder for folder in candidates if (folder / NAME).is_file()), None)


def load_to_judge(artifact: Path, device: str) -> Any:
    """As `load`, by sizes alone, on the device of a compile, or on the CPU where the files run nowhere else."""
    folder, manifest = locate_checkpoint_and_artifact(artifact)
    target = target_class_of_folder(folder, manifest[1] if manifest else None)
    model: Any = load(artifact, check="size", device=None if target.on_cpu else device)
    stored_bytes = target.stored_bytes(folder)
    if stored_bytes is not None:
        from ..ir.layers.linear import count_params

        model.n_params, model.stored_bytes = count_params(model), stored_bytes
    return model


@cache
def _make_registry() -> Registry:
    return Registry()


def target_facts(target_name: str) -> Mapping[str, Any]:
    """Header of a target; {} for a word that is no target's, whatever a manifest calls itself."""
    word = _make_registry().vocabulary.word("target", target_name)
    return word.facts if word else {}


def target_class(target_name: str) -> "type[Target]":
    """Target of a manifest's kind. Raises Reject (artifact-broken) where effc has none of that name."""
    if not target_facts(target_name):
        raise artifact_broken(
            f"an artifact names the target `{target_name}`, which effc does not have",
            help="use the effc that wrote it or a newer one, and install the package that has its target",
        ).rejection()
    return _make_registry().import_plugin_class("target", target_name)


def target_of_artifact(artifact: Path) -> "type[Target] | None":
    """Target that wrote an artifact; None for a folder without a manifest. Raises Reject as `target_class` does."""
    return target_class(read_manifest(artifact).kind) if (artifact / NAME).is_file() else None


def folder_use_sentence(target_name: str, folder: str) -> str:
    """Sentence about what effc does with a folder of an artifact; "" where no target says."""
    writer = target_name_of_form(folder)
    return next(
        (text for k in (target_name, writer) if k and (text := target_facts(k).get("does", {}).get(folder))), ""
    )


def loadable_forms(target_name: str) -> tuple[str, ...]:
    """Folders of a target that load as models, the best first."""
    return tuple(target_facts(target_name).get("loads", {}))


def marker_files(target_name: str, form_folder: str) -> tuple[str, ...]:
    """The files by any of which a form is known, relative to the artifact."""
    return tuple(
        f"{form_folder}/{file}"
        for file in target_facts(target_name).get("marks", {}).get(form_folder, "config.json").split()
    )


def has_marker_file(artifact: Path, target_name: str, form_folder: str) -> bool:
    """Whether a folder of an artifact has what a form is known by."""
    return any((artifact / file).is_file() for file in marker_files(target_name, form_folder))


def target_name_of_form(form_folder: str) -> str | None:
    """The target that writes folders of that name."""
    kinds = ("hf", *_make_registry().vocabulary.words("target"))  # others may hold one of hf's folders, too
    return next((kind for kind in kinds if form_folder in loadable_forms(kind)), None)


def target_class_of_folder(folder: Path, manifest: Manifest | None) -> Any:
    """The class that opens a folder; one of another name is what a loaded model saved, which `hf` opens."""
    kind = target_name_of_form(folder.name) or "hf"
    if manifest is not None and folder.name in loadable_forms(manifest.kind):
        kind = manifest.kind
    return _make_registry().import_plugin_class("target", kind)


def locate_checkpoint_and_artifact(path: Path) -> tuple[Path, tuple[Path, Manifest] | None]:
    """The checkpoint folder to read, and the artifact it belongs to with its manifest, if it does."""
    if (path / NAME).is_file():
        manifest = read_manifest(path)
        if not loadable_forms(manifest.kind):
            use = target_facts(manifest.kind).get("use") or f"see {path / 'README.md'} for how it is used"
            raise other_kind(f"{path} was written by the target `{manifest.kind}`", help=use).rejection()
        form = _best_form_folder(manifest)
        if form is None:
            raise no_artifact(f"{path} holds no {' and no '.join(loadable_forms(manifest.kind))} folder").rejection()
        return path / form, (path, manifest)
    if path.parent.name == POINTS and (path.parents[1] / NAME).is_file():
        manifest = read_manifest(path.parents[1])
        points = dict(checkpoint_folder_by_point(path.parents[1], manifest))
        if path.name not in points:
            raise no_artifact(
                f"{path.parents[1]} has no point {path.name}", help=f"its points are {', '.join(points) or 'none'}"
            ).rejection()
        return points[path.name], (path.parents[1], manifest)
    kind = target_name_of_form(path.name)
    if kind and (path.parent / NAME).is_file():
        return path, (path.parent, read_manifest(path.parent))
    if not (path / "config.json").is_file() and not (kind and has_marker_file(path.parent, kind, path.name)):
        raise no_artifact(
            f"{path} has no {NAME} and no config.json", help="name the folder that `effc compile` wrote"
        ).rejection()
    return path, None


def _unopened_folders(artifact: Path, manifest: Manifest, folder: Path) -> list[str]:
    """The other forms and points of an artifact: what opening `folder` does not read. What lies beside them it may."""
    opened = folder.relative_to(artifact).parts[0]
    forms = [form for form in loadable_forms(manifest.kind) if form != opened]
    if opened != POINTS:
        return [*forms, POINTS]
    return forms + [f"{POINTS}/{member['name']}" for member in manifest.members if member["name"] not in folder.parts]


def _best_form_folder(manifest: Manifest) -> str | None:
    """The best of the folders that an artifact has."""
    present = (
        f for f in loadable_forms(manifest.kind) if any(m in manifest.files for m in marker_files(manifest.kind, f))
    )
    return next(present, None)


def checkpoint_folder_by_point(artifact: Path, manifest: Manifest) -> Iterator[tuple[str, Path]]:
    """The points of a front by name, each with the folder that loads."""
    for member in manifest.members:
        inside = f"{POINTS}/{member['name']}"
        present = (
            f for f in loadable_forms("hf") if any(f"{inside}/{m}" in manifest.files for m in marker_files("hf", f))
        )
        form = next(present, None)
        if form is None:
            raise no_artifact(f"{artifact} has no model of the point {member['name']}").rejection()
        yield member["name"], artifact / inside / form


def has_checkpoint(manifest: Manifest) -> bool:
    """Whether an artifact has a checkpoint folder that loads."""
    return _best_form_folder(manifest) is not None


def version_mismatch_notes(versions: Mapping[str, str]) -> list[str]:
    """A sentence for each library that is older here than where it was written, or a major version apart."""
    from ..core.fingerprint import library_versions as present

    sentences = []
    for name, installed in present().items():
        then = versions.get(name, "")
        if then and (
            _major_and_minor(installed) < _major_and_minor(then)
            or _major_and_minor(installed)[0] != _major_and_minor(then)[0]
        ):
            sentences.append(f"written with {name} {then}, loaded with {name} {installed}: not tested together")
    return sentences


def _major_and_minor(version: str) -> tuple[int, ...]:
    numbers = [int(p) if p.isdigit() else 0 for p in version.split("+")[0].split(".")[:2]]
    return tuple(numbers + [0] * (2 - len(numbers)))
