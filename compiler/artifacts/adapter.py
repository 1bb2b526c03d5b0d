"""Adapter folders, read as untrusted input: numbers and names of a LoRA, nothing that peft would import or unpickle."""

from pathlib import Path
from typing import Any

from ...dsl.syntax.diagnostics import Fault
from ..core.json_errors import refusing
from ..core.safe_read import read_json

rejected_adapter = Fault(
    "refused-adapter",
    "An adapter folder holds something that effc's own don't.\n\n"
    "effc reads LoRA of linear modules from safetensors. What else peft knows, open with peft itself.",
    exit="environment",
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LARGEST = 1 << 20  # bytes of a config
_PREFIX = "base_model.model."


def load_peft_adapters(folder: Path, base: Any) -> Any:
    """The base with the folder's adapters on it, in evaluation mode."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    body = _read_checked_adapter_config(folder / CONFIG)
    paths = {name for name, module in base.named_modules() if hasattr(module, "weight")}
    unknown = [path for path in body["target_modules"] if path not in paths]
    if unknown:
        raise rejected_adapter(f"{folder / CONFIG} names `{unknown[0][:80]}`, which the base doesn't have").rejection()
    _check_tensor_header(folder, body)
    with refusing(rejected_adapter, f"{folder / WEIGHTS} can't be read"):
        tensors = load_file(folder / WEIGHTS)
    config = LoraConfig(
        r=body["r"],
        lora_alpha=body["lora_alpha"],
        lora_dropout=0.0,
        bias="none",
        target_modules=list(body["target_modules"]),
        inference_mode=True,
        fan_in_fan_out=body["fan_in_fan_out"],
    )
    model = get_peft_model(base, config)
    with refusing(rejected_adapter, f"{folder / WEIGHTS} has other shapes than the base", kinds=RuntimeError):
        set_peft_model_state_dict(model, tensors)
    return model.eval()


def check(folder: Path) -> None:
    """Read the numbers, and the headers of the weights, as `read` does; no model is made."""
    _check_tensor_header(folder, _read_checked_adapter_config(folder / CONFIG))


def _check_tensor_header(folder: Path, body: dict[str, Any]) -> None:
    """Hold names and ranks of the weights, by their header, against the config, before peft makes room for them."""
    from ..models.checkpoints.safetensors_header import read_safetensors_header

    with refusing(rejected_adapter, f"{folder / WEIGHTS} can't be read"):
        slots = read_safetensors_header(folder / WEIGHTS).slots
    expected = {f"{_PREFIX}{path}.{side}.weight" for path in body["target_modules"] for side in ("lora_A", "lora_B")}
    if set(slots) != expected:
        difference = sorted(expected ^ set(slots))[0]
        raise rejected_adapter(f"{folder / WEIGHTS} and {CONFIG} differ about `{difference[:80]}`").rejection()
    for name, slot in slots.items():
        axis = 0 if name.endswith(".lora_A.weight") else 1
        if len(slot.shape) != 2 or slot.shape[axis] != body["r"]:
            fact = f"has `{name[:80]}` of {list(slot.shape)}, and the rank of {CONFIG} is {body['r']}"
            raise rejected_adapter(f"{folder / WEIGHTS} {fact}").rejection()


def _read_checked_adapter_config(file: Path) -> dict[str, Any]:
    """The few fields that a LoRA needs; Reject where one is missing or of another form."""
    with refusing(rejected_adapter, f"{file}", kinds=(OSError, ValueError, AssertionError)):
        body = read_json(file, _LARGEST)
        assert isinstance(body, dict) and body.get("peft_type") == "LORA", "it is no LoRA"
        assert type(body.get("r")) is int and 0 < body["r"] <= 1 << 16, "its rank is no positive number"
        alpha = body.get("lora_alpha")
        ordinary = isinstance(alpha, int | float) and type(alpha) is not bool and abs(alpha) < 1e9
        assert ordinary, "its `lora_alpha` is no number of an ordinary size"
        targets = body.get("target_modules")
        assert isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets), "it names no modules"
    return body | {"fan_in_fan_out": body.get("fan_in_fan_out") is True, "target_modules": sorted(targets)}
