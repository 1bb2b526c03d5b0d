"""Artifacts of kind `hf`, and folders that such models saved again, to ordinary transformers models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ...dsl.diagnostics import Fault, Reject
from ..report.progress import Listener, Warned, silent
from .manifest import NAME, Manifest, no_artifact, read_manifest, verify_files
from .sealed import attach, not_sealed, read_record

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORMS = ("compact", "model", "compat", "program", "native", "adapter", "reft")
MARKS = {"program": "program/model.pt2", "native": "native/plan.json", "adapter": "adapter/adapter_config.json",
         "reft": "reft/reft.json"}

SPARE = 64       # times as large as its stored weights may a model have been before it was edited

tensors_differ = Fault("tensors-differ", "The tensors of a folder are not those that its record asks for.",
                       exit="environment")
other_kind = Fault("other-kind", "An artifact of this target is not loaded as a model.", exit="usage")


class LoadOptions(TypedDict, total=False):
    """What `load` may be told, as its page says."""

    device: Any
    dtype: "torch.dtype | None"
    check: Literal["sha256", "size", "auto"]
    threads: int | None
    sequences: int | None
    steady: bool
    kernels: bool
    signed_by: Sequence[str]
    tell: Listener


def load(path: str | Path, *, device: Any = None, dtype: "torch.dtype | None" = None,
         check: Literal["sha256", "size", "auto"] = "auto", threads: int | None = None,
         sequences: int | None = None, steady: bool = False, kernels: bool = True,
         base: Any = None, signed_by: Sequence[str] = (), tell: Listener = silent) -> "PreTrainedModel":
    """An ordinary `PreTrainedModel` in evaluation mode: it generates, trains and saves itself again.

    Of the target `pt2`, a module that computes what the model's forward did and no more; of `native`, one that
    computes and generates by the native engine (`compiler.native.model.NativeModel`); of `reft`, the base with its
    interventions.

    path        an artifact (its compact form comes first), one of its forms, or what a loaded model saved
    device      moved there after loading; weights are mapped from disk on the CPU
    dtype       of floating weights; as stored by default
    check       what of the files is compared with the manifest; "size" skips reading them all, which "auto" does for
                `native` alone
    threads     that run the native engine; as many as torch has by default
    sequences   that the native engine keeps at once; 16 by default
    steady      the native engine gives the same logits to the bit whatever other sequences it computes in a call
    kernels     state-space scans run on effc's kernels where those are compiled; False: where the recipe says so
    base        of the target `reft`: the model that interventions are put onto, or its folder; by default the one that
                the artifact names
    signed_by   public keys (`ed25519:...`, or files with one), one of which must have signed the artifact; every
                hash is then compared
    tell        hears a sentence where versions differ from those that wrote it
    """
    from ..layers.linear import refuse_elsewhere

    folder, manifest = locate(Path(path))
    if signed_by:
        from .signature import check_signature

        check_signature(manifest[0] if manifest else Path(path), signed_by)
    if manifest:
        hashes = bool(signed_by) or check == "sha256" or (check == "auto" and folder.name != "native")
        verify_files(*manifest, hashes=hashes, under=folder.name)
    if base is not None and folder.name != "reft":
        raise Reject(other_kind(f"{folder} is a model, and goes onto no other", help="load it without `base`"))
    own = {"base": base, "threads": threads, "sequences": sequences, "steady": steady}
    model, recorded = _of_form(folder, dtype, device, {name: value for name, value in own.items() if value is not None})
    versions = manifest[1].lock.get("versions", {}) if recorded is None and manifest else recorded or {}
    for sentence in newer_than_here(versions):
        tell(Warned(sentence))
    if kernels and folder.name not in ("program", "native"):
        from ..layers.quick import quicken

        quicken(model)
    if device is None:
        return model
    refuse_elsewhere(model, device)
    return model.to(device)


def _of_form(folder: Path, dtype: "torch.dtype | None", device: Any,
             own: dict[str, Any]) -> "tuple[Any, Mapping[str, str] | None]":
    """The model of a checkpoint folder, and the versions that wrote it where the folder itself says so."""
    if folder.name == "program":
        from .exported import read

        model = read(folder)
        return (model if dtype is None else model.to(dtype)), None
    if folder.name == "native":
        return _native(folder, dtype, device, own), None
    if folder.name == "reft":
        return _upon(folder, own.get("base"), dtype), None
    if folder.name in ("model", "compat"):
        return _stock(folder, dtype), None
    if folder.name == "adapter":
        return _adapted(folder, dtype), None
    record = read_record(folder)
    return rebuild(folder, record, dtype), record.get("versions", {})


def _upon(folder: Path, base: Any, dtype: "torch.dtype | None") -> Any:
    """The base, as it is given or where the folder says, with the folder's interventions."""
    import json

    from .reft import base_folder, put_on
    from .sealed import KEY

    if base is None or isinstance(base, (str, Path)):
        place = base_folder(folder) if base is None else Path(base)
        if not any((place / name).is_file() for name in (NAME, "config.json")):
            raise Reject(no_artifact(f"{place} holds no model to put interventions on",
                                     help="name the folder of the base"))
        sealed = (place / NAME).is_file() or KEY in json.loads((place / "config.json").read_bytes())
        base = load(place, kernels=False) if sealed else _stock(place, None)
    put_on(base, folder)
    return (base if dtype is None else base.to(dtype)).eval()


def locate(path: Path) -> tuple[Path, tuple[Path, Manifest] | None]:
    """The checkpoint folder to read, and the artifact it belongs to with its manifest, if it does."""
    if (path / NAME).is_file():
        manifest = read_manifest(path)
        if not holds_model(manifest):
            raise Reject(other_kind(f"{path} was written by the target `{manifest.kind}`",
                                    help=f"see {path / 'README.md'} for how it is used"))
        form = next((f for f in FORMS if _mark(f) in manifest.files), None)
        if form is None:
            raise Reject(no_artifact(f"{path} holds no {' and no '.join(FORMS)} folder"))
        return path / form, (path, manifest)
    if path.name in FORMS and (path.parent / NAME).is_file():
        return path, (path.parent, read_manifest(path.parent))
    if not (path / "config.json").is_file() and not (path.parent / _mark(path.name)).is_file():
        raise Reject(no_artifact(f"{path} has no {NAME} and no config.json",
                                 help="name the folder that `effc compile` wrote"))
    return path, None


def holds_model(manifest: Manifest) -> bool:
    """Whether an artifact has a checkpoint folder that loads."""
    return any(_mark(form) in manifest.files for form in FORMS)


def _mark(form: str) -> str:
    """The file by which a form is known."""
    return MARKS.get(form, f"{form}/config.json")


def _native(folder: Path, dtype: "torch.dtype | None", device: Any, own: dict[str, Any]) -> Any:
    from ..layers.linear import cpu_only
    from ..native.opening import open_native

    if device is not None and str(device).partition(":")[0] != "cpu":
        raise Reject(cpu_only(f"{folder} is run by the native engine, which {device} has not",
                              help="load it on the CPU"))
    if dtype is not None:
        raise Reject(other_kind(f"{folder} holds packed weights, which have no other dtype",
                                help="load it without `dtype`"))
    return open_native(folder, **own)


def _adapted(folder: Path, dtype: "torch.dtype | None") -> Any:
    """The base that lies beside an adapter folder, with the adapters on it; peft reads no code and no pickle here."""
    from ..machine.environment import check_modules

    check_modules(("peft", "safetensors"), "tune", "an artifact of the target `peft`")
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise Reject(no_artifact(f"{folder} has no adapter_model.safetensors"))
    return PeftModel.from_pretrained(_stock(folder.parent / "base", dtype), folder, local_files_only=True).eval()


def _stock(folder: Path, dtype: "torch.dtype | None") -> "PreTrainedModel":
    """A folder that transformers reads itself."""
    from ..checkpoints.bounds import check_numbers
    from ..checkpoints.checkpoint import check_names, stock
    from ..checkpoints.folder import find_weights, read_config, refuse_adapter

    config, slots = read_config(folder / "config.json", str(folder)), find_weights(folder, str(folder)).slots
    refuse_adapter(folder, str(folder))
    check_numbers(config, slots, str(folder))
    model, info = stock(folder, config, sum(slot.count for slot in slots.values()), dtype=dtype or "auto",
                        use_safetensors=True, local_files_only=True, output_loading_info=True,
                        ignore_mismatched_sizes=True)
    check_names(info, str(folder))
    return model.eval()


def rebuild(folder: Path, record: Mapping[str, Any], dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """The blank original, edited again, with the folder's weights mapped in."""
    import torch

    from ..checkpoints.blank import blank, cut_tables
    from ..checkpoints.bounds import check_numbers
    from ..checkpoints.checkpoint import build, check_size
    from ..checkpoints.folder import find_weights
    from ..ir.edits import Edits, replay

    slots = find_weights(folder, str(folder)).slots
    check_numbers(record["base"], slots, str(folder), spare=SPARE)
    with torch.device("meta"):
        check_size(build(record["base"], record["dtype"]), sum(slot.count for slot in slots.values()), spare=SPARE)
    model = blank(record["base"], record["dtype"])
    edits = Edits.from_json(record["edits"])
    try:
        replay(model, edits)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Reject(not_sealed(f"{folder / 'config.json'} has edits that this effc can't replay: {error}",
                                help="install the effc that wrote it")) from error
    fill(model, folder, cut_tables(model, edits.shapes), dtype)
    attach(model, record)
    _dress(model, folder)
    return model.eval()


def fill(model: Any, folder: Path, tables: "Mapping[str, torch.Tensor]",
         dtype: "torch.dtype | None" = None) -> None:
    """Map the folder's tensors into the model; Reject unless they are the model's, name by name."""
    from ..checkpoints.tensors import mapped
    from ..ir.surgery import put
    from ..ir.weights import assign, distinct

    wanted = dict(distinct(model)) | tables
    found = dict(mapped(folder))
    known = model.state_dict(keep_vars=True).keys() | wanted.keys()
    wrong = [f"`{n}` is missing" for n in wanted if n not in found]
    wrong += [f"`{n}` has no place in the model" for n in found if n not in known]
    wrong += [f"`{n}` is {tuple(found[n].shape)} in the file and {tuple(w.shape)} in the model"
              for n, w in wanted.items() if n in found and found[n].shape != w.shape]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Reject(tensors_differ(f"{folder}: {', '.join(wrong[:3])}{more}",
                                    help="weights and config.json are of different saves: copy both again"))
    kept = {name: found[name] for name in wanted if name not in tables}
    assign(model, {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in kept.items()})
    for name in tables:
        put(model, name, found[name])


def _dress(model: Any, folder: Path) -> None:
    """What `from_pretrained` adds to a bare model."""
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(folder)


def newer_than_here(versions: Mapping[str, str]) -> list[str]:
    """A sentence for each library that is older here than where it was written, or a major version apart."""
    from ..machine.fingerprint import versions as present

    said = []
    for name, here in present().items():
        then = versions.get(name, "")
        if then and (_minor(here) < _minor(then) or _minor(here)[0] != _minor(then)[0]):
            said.append(f"written with {name} {then}, loaded with {name} {here}: not tested together")
    return said


def _minor(version: str) -> tuple[int, ...]:
    numbers = [int(p) if p.isdigit() else 0 for p in version.split("+")[0].split(".")[:2]]
    return tuple(numbers + [0] * (2 - len(numbers)))
