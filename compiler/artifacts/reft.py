"""Interventions apart from their model: a folder of a few kilobytes that goes onto the base again.

    reft/reft.json            the edits that put them in, and which base they belong to
    reft/model.safetensors    their numbers

The base is not copied where anyone can have it: it is named, and known by a hash of all its tensors. An artifact never
makes effc fetch anything: a base of the hub has to be in the hub's own cache, or is given.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ...dsl.syntax.diagnostics import Fault
from ..core.json_errors import reject_on_error
from ..core.safe_read import MANIFEST, read_json
from .compact_config import KEY, make_compact_record, patch_save_pretrained

if TYPE_CHECKING:
    from ...dsl.syntax.diagnostics import Diagnostic
    from ..ir.edits import Edits
    from ..ir.layers.reft import Reft
    from ..ir.program import Program

FOLDER, FILE, FORMAT = "reft", "reft.json", 1
BASE = "base"  # beside it, where the base is in the artifact

no_interventions = Fault("no-interventions", "A folder of interventions is damaged, or is none.", exit="environment")
other_base = Fault(
    "other-base",
    "Interventions are put onto another model than they were trained in.\n\n"
    "They edit hidden states by coordinates that mean something in one model only: in any other they make noise.",
    exit="environment",
)
no_base = Fault("no-base", "The model that interventions belong to is not where their folder says.", exit="environment")


def _is_reft_tensor_name(name: str) -> bool:
    from ..transforms.editing.interventions import NAME

    return f".{NAME}." in name


# -- writing -------------------------------------------------------------------------------------------------


class BaseModelInfo(TypedDict):
    """Model that interventions belong to; `place` is `zoo:NAME`, `hf:ORG/NAME` or a folder, "" for `base/`."""

    config: Mapping[str, Any]
    dtype: str
    place: str


def write_reft_folder(program: "Program", folder: Path, base_model: BaseModelInfo) -> None:
    """Tensors and edits of the interventions, and their base with the hash of its tensors."""
    from ..core.cache import canonical_json
    from ..ir.edits import Edits
    from ..ir.layers.reft import interventions
    from ..ir.weights import distinct_tensors, model_weights_hash
    from ..models.checkpoints.tensor_files import LazyTensor, write_safetensors_files

    paths = [path for path, _ in interventions(program.model)]
    units = [path.rpartition(".")[0] for path in paths]
    edits = Edits(
        swapped={path: program.edits.swapped[path] for path in paths},
        graphs={unit: program.edits.graphs[unit] for unit in units},
    )
    write_safetensors_files(
        folder,
        [LazyTensor.of(name, t) for name, t in distinct_tensors(program.model) if _is_reft_tensor_name(name)],
        1 << 62,
    )
    edits_json = edits.to_json()
    graphs = list({canonical_json(graph): graph for graph in edits_json["graphs"].values()}.values())  # alike
    edits_json["graphs"] = {unit: graphs.index(graph) for unit, graph in edits_json["graphs"].items()}
    body = {
        "format": FORMAT,
        "base": {**base_model, "sha256": model_weights_hash(program.model)},
        "edits": edits_json,
        "graphs": graphs,
    }
    (folder / FILE).write_text(canonical_json(body) + "\n", encoding="utf-8")


# -- reading -------------------------------------------------------------------------------------------------


def read_reft_base_and_edits(folder: Path) -> "tuple[dict[str, Any], Edits]":
    """Base and edits of a folder; Reject on anything that `write_reft_folder` does not write."""
    from ..ir.edits import Edits

    with reject_on_error(no_interventions, f"{folder / FILE} is no JSON that can be read"):
        body = read_json(folder / FILE, MANIFEST)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise no_interventions(
            f"{folder / FILE} is not of format {FORMAT}", help="install the effc that wrote it"
        ).rejection()
    base, edits = body.get("base"), Edits.from_json(_with_graphs_for_numbers(body.get("edits"), body.get("graphs")))
    if not (
        isinstance(base, dict)
        and isinstance(base.get("config"), dict)
        and all(isinstance(base.get(name), str) for name in ("place", "sha256", "dtype"))
    ):
        raise no_interventions(f"{folder / FILE} does not say which model it belongs to").rejection()
    edits_json = edits.to_json()
    unexpected = [name for name, value in edits_json.items() if value and name not in ("format", "swapped", "graphs")]
    kinds = {entry["class"] for entry in edits.swapped.values()}
    if unexpected or kinds != {"Reft"} or {path.rpartition(".")[0] for path in edits.swapped} != set(edits.graphs):
        raise no_interventions(f"{folder / FILE} holds other edits than interventions").rejection()
    return base, edits


def _with_graphs_for_numbers(edits: Any, graphs: Any) -> Any:
    """Edits with the graphs that their numbers stand for."""
    if not (isinstance(edits, dict) and isinstance(edits.get("graphs"), dict) and isinstance(graphs, list)):
        raise no_interventions(f"{FILE} holds no edits").rejection()
    numbers = edits["graphs"].values()
    if not all(type(n) is int and 0 <= n < len(graphs) for n in numbers):
        raise no_interventions(f"{FILE} names graphs that it does not hold").rejection()
    return {**edits, "graphs": {unit: graphs[n] for unit, n in edits["graphs"].items()}}


def read_interventions(folder: Path) -> "dict[str, Reft]":
    """Interventions of a folder without their base, by the paths of the layers that they stand behind.

    Raises Reject (no-interventions).
    """
    from torch import nn

    from ..ir.layers.reft import Reft
    from ..models.checkpoints.tensor_files import iterate_mapped_tensors
    from ..models.checkpoints.weights import read_weight_headers

    _, edits = read_reft_base_and_edits(folder)
    stored = dict(iterate_mapped_tensors(read_weight_headers(folder, str(folder))))
    result, n_tensors = {}, 0
    for path, entry in edits.swapped.items():
        try:
            layer = Reft.from_spec(nn.Linear(1, 1, device="meta"), entry["spec"])
        except ValueError as error:
            raise no_interventions(f"{folder / FILE}: `{path:.80}` has {error}").rejection() from error
        tensors = {name: stored[f"{path}.{name}"] for name in layer.state_dict() if f"{path}.{name}" in stored}
        if {n: t.shape for n, t in layer.state_dict().items()} != {n: t.shape for n, t in tensors.items()}:
            raise _other_tensors_diagnostic(folder).rejection()
        layer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        _refuse_non_finite_or_non_orthogonal(folder, path, layer)
        result[path.rpartition(".")[0]], n_tensors = layer.eval(), n_tensors + len(tensors)
    if n_tensors < len(stored):
        raise _other_tensors_diagnostic(folder).rejection()
    return result


def _refuse_non_finite_or_non_orthogonal(folder: Path, path: str, layer: "Reft") -> None:
    """Raise Reject of numbers that are not finite, and of rows that no basis is made of."""
    from torch import linalg

    problem = "" if all(bool(t.isfinite().all()) for t in layer.state_dict().values()) else "holds NaN or infinity"
    try:
        factors = [t for f in layer.interventions() for t in f.low_rank_factors()] if not problem else []
    except linalg.LinAlgError:
        problem = "has rows that depend on each other"
    if problem or not all(bool(t.isfinite().all()) for t in factors):
        raise no_interventions(f"{folder}: `{path:.80}` {problem or 'has no basis of its rows'}").rejection()


def _other_tensors_diagnostic(folder: Path) -> "Diagnostic":
    return no_interventions(
        f"{folder}: the tensors are not those of its interventions",
        help=f"weights and {FILE} are of different saves: copy both again",
    )


def find_base_model_folder(folder: Path) -> Path:
    """Folder of the base. Raises Reject (no-base)."""
    inside = folder.parent / BASE / "compact"
    if inside.is_dir():
        return inside
    location = read_reft_base_and_edits(folder)[0]["place"]
    kind, colon, name = location.partition(":")
    path = _zoo_folder(name) if kind == "zoo" else _hub_cache_folder(name) if kind == "hf" and colon else Path(location)
    if path is None or not (path / "config.json").is_file():
        raise no_base(
            f"{folder} belongs to {location or 'a model beside it'}, which is not here",
            help='give it: `effc.load(path, base="folder")`; a model of the hub has to be fetched first',
        ).rejection()
    return path


def _zoo_folder(name: str) -> Path | None:
    from ..inputs.sources.zoo import zoo_folders_by_name

    return zoo_folders_by_name().get(name)


def _hub_cache_folder(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def attach_interventions(model: Any, folder: Path, *, check_base_hash: bool = True) -> None:
    """Put the interventions of a folder onto their base, in place.

    Raises Reject (other-base) where it is another model, or has interventions already.

    check_base   whether the model's tensors are compared with those that the interventions were trained in
    """
    from ..ir.edits import replay_edits
    from ..ir.weights import assign_tensors, model_weights_hash
    from ..models.checkpoints.tensor_files import iterate_mapped_tensors
    from ..models.checkpoints.weights import read_weight_headers

    base, edits = read_reft_base_and_edits(folder)
    if any(_is_reft_tensor_name(name) for name, _ in model.named_parameters()):
        raise other_base("the model has interventions already", help="attach them to the base as it was").rejection()
    if check_base_hash and model_weights_hash(model) != base["sha256"]:
        owner = base["place"] or "the model beside it"
        raise other_base(
            f"{folder} belongs to {owner}, and this {type(model).__name__} has other tensors",
            help="load the base as it was when they were trained",
        ).rejection()
    missing = [path for path in edits.graphs if path not in dict(model.named_modules())]
    if missing:
        raise other_base(f"{folder} edits {missing[0]}, which the model has not").rejection()
    sealed = getattr(model.config, KEY, None)
    replay_edits(model, edits)
    parameters, stored = (
        {n: t for n, t in model.named_parameters() if _is_reft_tensor_name(n)},
        dict(iterate_mapped_tensors(read_weight_headers(folder, str(folder)))),
    )
    if {n: t.shape for n, t in parameters.items()} != {n: t.shape for n, t in stored.items()}:
        raise _other_tensors_diagnostic(folder).rejection()
    assign_tensors(model, stored)
    _patch_save_pretrained(model, base, edits, sealed)


def _patch_save_pretrained(
    model: Any, base_model: Mapping[str, Any], edits: "Edits", parent_record: Mapping[str, Any] | None
) -> None:
    """Have the model's own `save_pretrained` write a folder that has the interventions, for `effc.load`."""
    edits_json = edits.to_json()
    if parent_record:
        under = parent_record["edits"]
        edits_json = {**under, **{name: {**under[name], **edits_json[name]} for name in ("swapped", "graphs")}}
    patch_save_pretrained(
        model,
        make_compact_record(
            parent_record["base"] if parent_record else base_model["config"], edits_json, base_model["dtype"]
        ),
    )
