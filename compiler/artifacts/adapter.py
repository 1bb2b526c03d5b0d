"""Adapter folders, read as untrusted input: numbers and names of a LoRA, nothing that peft would import or unpickle."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.syntax.diagnostics import Fault
from ..core.json_errors import reject_on_error
from ..core.safe_read import read_json, require_or_unlisted
from .lora_patterns import ModulePatterns, UnreadPattern, dotted_suffixes, excluding_config_field, paths_not_targeted

if TYPE_CHECKING:
    from torch import Tensor, nn

rejected_adapter = Fault(
    "refused-adapter",
    "An adapter folder holds something that effc doesn't compute, or doesn't fit its model.\n\n"
    "effc reads LoRA of linear modules from safetensors. What else peft knows, open with peft itself.",
    exit="environment",
)

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_LARGEST = 1 << 20  # bytes of a config
_LARGEST_RANK = 1 << 16
_PREFIX, _FACTORS = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules"}
# Of training, of how peft found the modules whose tensors are here, or of what is refused by a field of its own.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "velora_config",
}  # fmt: skip
_ORDINARY = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "orthogonal")}


@dataclass(frozen=True)
class Lora:
    """Rank and alpha of each module's adapter, by its path."""

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    is_rank_stabilized: bool


def load_peft_adapters(folder: Path, base_model: Any) -> Any:
    """The base with the folder's adapters on it, in evaluation mode. Raises Reject (refused-adapter)."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    lora, shapes = read_lora(folder)
    transposed = _refuse_shape_mismatch_unless_folded(folder, shapes, base_model)
    tensors = load_file(folder / WEIGHTS)
    _refuse_non_finite_tensors(folder, tensors)
    first = next(iter(lora.ranks))
    config = LoraConfig(
        r=lora.ranks[first],
        lora_alpha=lora.alphas[first],  # type: ignore[arg-type]  # a number that it divides, whatever the annotation says
        rank_pattern=dict(lora.ranks),
        alpha_pattern=dict(lora.alphas),
        use_rslora=lora.is_rank_stabilized,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(lora.ranks),
        inference_mode=True,
        fan_in_fan_out=transposed,
    )
    model = get_peft_model(base_model, config)
    set_peft_model_state_dict(model, tensors)
    return model.eval()


def read_lora_factors(folder: Path) -> "dict[str, tuple[Tensor, Tensor]]":
    """(down [rank, in], up [out, rank] with its scale in it) of each module's adapter, by its path, float32.

    Raises Reject (refused-adapter, damaged-weights).
    """
    from safetensors.torch import load_file

    lora, _ = read_lora(folder)
    tensors = load_file(folder / WEIGHTS)
    _refuse_non_finite_tensors(folder, tensors)
    factors = {}
    for path, rank in lora.ranks.items():
        down, up = (tensors[f"{_PREFIX}{path}{side}"].float() for side in _FACTORS)
        factors[path] = down, up * (lora.alphas[path] / (rank**0.5 if lora.is_rank_stabilized else rank))
    return factors


def check_adapter_folder(folder: Path) -> None:
    """Read the numbers, and the headers of the weights, as `load_peft_adapters` does; no model is made."""
    read_lora(folder)


def read_lora(folder: Path) -> tuple[Lora, dict[str, tuple[int, ...]]]:
    """Ranks and alphas of a folder, and the shapes of its tensors by name, all by headers: no room is made.

    Raises Reject (refused-adapter, damaged-weights).
    """
    body = _read_checked_adapter_config(folder / CONFIG)
    shapes = _read_shapes(folder)
    down = {name: shape for name, shape in shapes.items() if name.endswith(_FACTORS[0])}
    ranks = {name[len(_PREFIX) : -len(_FACTORS[0])]: shape[0] for name, shape in down.items()}
    expected = {f"{_PREFIX}{path}{side}" for path in ranks for side in _FACTORS}
    if not ranks or set(shapes) != expected:
        difference = sorted(expected ^ set(shapes))[0] if shapes else "a tensor"
        raise rejected_adapter(
            f"{folder / WEIGHTS} is no LoRA of linear modules, by `{difference[:80]}`",
            help="have peft save it with `save_embedding_layers=False`, without the base's own layer"
            if difference.endswith(".base_layer.weight")
            else "open it with peft itself",
        ).rejection()
    _refuse_unnamed_modules(folder, body["target_modules"], ranks)
    _refuse_rank_mismatch(folder, body, shapes, ranks)
    alphas = {path: body["alpha_pattern"].value_for_path(path, body["lora_alpha"]) for path in ranks}
    if (field := excluding_config_field(ranks, body)) is not None:
        raise rejected_adapter(f"{folder / CONFIG} leaves out, by `{field}`, a module that has tensors").rejection()
    return Lora(ranks, alphas, body["use_rslora"]), shapes


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from ..models.checkpoints.safetensors_header import FLOATS, read_safetensors_header

    try:
        slots = read_safetensors_header(folder / WEIGHTS).slots
    except OSError as error:
        fact = f"can't be read: {(error.strerror or str(error)).lower()}"
        if (folder / PICKLE).exists():
            fact += f"; {PICKLE} is a pickle, which can run code"
        help = "have peft write it as safetensors"
        raise rejected_adapter(f"{folder / WEIGHTS} {fact}", help=help).rejection() from error
    for name, slot in slots.items():
        if len(slot.shape) != 2 or slot.dtype not in FLOATS:
            raise rejected_adapter(
                f"{folder / WEIGHTS} has `{name[:80]}` of {slot.dtype} {list(slot.shape)}, which is no matrix of floats"
            ).rejection()
    return {name: slot.shape for name, slot in slots.items()}


def _refuse_unnamed_modules(folder: Path, target_modules: list[str] | str, ranks: Mapping[str, int]) -> None:
    """Hold modules with tensors against names of the config, which are paths or their ends, or its expression; one that
    could run for long is not tried."""
    if missing := paths_not_targeted(ranks, target_modules):
        raise rejected_adapter(f"{folder / CONFIG} does not name `{missing[0][:80]}`, which has tensors").rejection()
    named = set() if isinstance(target_modules, str) else set(target_modules)
    if bare := sorted(named - {end for path in ranks for end in dotted_suffixes(path)}):
        raise rejected_adapter(f"{folder / CONFIG} names `{bare[0][:80]}`, which has no tensors").rejection()


def _refuse_rank_mismatch(
    folder: Path, adapter_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int]
) -> None:
    for path in ranks:
        rank = adapter_config["rank_pattern"].value_for_path(path, adapter_config["r"])
        for side, axis in zip(_FACTORS, (0, 1), strict=True):
            name = f"{_PREFIX}{path}{side}"
            if shapes[name][axis] != rank:
                fact = f"has `{name[:80]}` of {list(shapes[name])}, and the rank of {CONFIG} is {rank}"
                raise rejected_adapter(f"{folder / WEIGHTS} {fact}").rejection()


def _refuse_shape_mismatch_unless_folded(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], base_model: "nn.Module"
) -> bool:
    """Hold tensors against the modules of a model; whether these store weights as [inputs, outputs]."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules, is_transposed = dict(base_model.named_modules()), False
    for name, shape in shapes.items():
        side = next(side for side in _FACTORS if name.endswith(side))
        module = modules.get(path := name[len(_PREFIX) : -len(side)])
        if not isinstance(module, nn.Linear | Conv1D):
            missing = "doesn't have" if module is None else "has as no linear module"
            raise rejected_adapter(f"{folder / WEIGHTS} adapts `{path[:80]}`, which the model {missing}").rejection()
        is_transposed |= isinstance(module, Conv1D)
        outputs, inputs = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        width, expected = (shape[1], inputs) if side == _FACTORS[0] else (shape[0], outputs)
        if width != expected:
            raise rejected_adapter(
                f"{folder / WEIGHTS} has `{name[:80]}` of {list(shape)}; the model has {expected} in place of {width}",
                help="name the model that it was trained on",
            ).rejection()
    return is_transposed


def _refuse_non_finite_tensors(folder: Path, tensors: "Mapping[str, Tensor]") -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise rejected_adapter(f"{folder / WEIGHTS}: `{name[:80]}` holds NaN or infinity").rejection()


def _read_checked_adapter_config(file: Path) -> dict[str, Any]:
    """The few fields that a LoRA needs; Reject where one is missing or of another form, or where another field has peft
    compute something else."""
    with reject_on_error(rejected_adapter, str(file)):
        body = read_json(file, _LARGEST)
        require_or_unlisted(isinstance(body, dict) and body.get("peft_type") == "LORA", "it is no LoRA")
        require_or_unlisted(_is_rank(body.get("r")), f"its rank is no number from 1 to {_LARGEST_RANK}")
        require_or_unlisted(_is_alpha(body.get("lora_alpha")), "its `lora_alpha` is no number of an ordinary size")
        for name, is_right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
            pattern = body.get(name) or {}
            require_or_unlisted(
                isinstance(pattern, dict) and all(map(is_right, pattern.values())), f"its `{name}` has no numbers"
            )
        targets = body.get("target_modules")
        require_or_unlisted(isinstance(targets, list | str) and bool(targets), "it names no modules")
        require_or_unlisted(all(isinstance(t, str) for t in targets), "it names no modules")
        for name, values in _ORDINARY.items():
            require_or_unlisted(body.get(name, values[0]) in values, f"effc doesn't compute what its `{name}` says")
        unsupported = [name for name in body.keys() - _READ - _WITHOUT_EFFECT - _ORDINARY.keys() if body[name]]
        require_or_unlisted(
            not unsupported, f"effc doesn't compute what its `{min(unsupported, default='')[:80]}` says"
        )
    patterns = {name: _module_patterns(file, name, body.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    return body | patterns | {"use_rslora": body.get("use_rslora") is True}


def _module_patterns(file: Path, field: str, value_by_pattern: Mapping[str, Any]) -> ModulePatterns:
    try:
        return ModulePatterns(value_by_pattern)
    except UnreadPattern as error:
        problem, help = (
            f"{file}: its `{field}` has {error}, which is not tried",
            "name modules by the ends of their paths",
        )
        raise rejected_adapter(problem, help=help).rejection() from error


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST_RANK


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e9
