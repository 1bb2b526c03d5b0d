"""Olive's JSON configurations: an input model and passes in the order of the file.

Source: its documentation and `olive/passes/`, as of version 0.13.
"""

from collections.abc import Mapping
from typing import Any

from .steps import (
    DATA,
    Imported,
    integer_text_or_empty,
    number_text_or_empty,
    one_line,
    percent_or_empty,
    selector_and_remarks,
)

TOOL = "Olive"
GPTQ = ("gptq", "gptqquantizer", "gptqmodel")
ROUND = ("rtn",)
LORA = ("lora", "dora", "loha", "lokr")
EXPORT = ("onnxconversion", "modelbuilder", "optimumconversion")


def recognizes(body: Any) -> bool:
    return isinstance(body, dict) and isinstance(body.get("passes"), dict)


def import_recipe(foreign_recipe: Mapping[str, Any]) -> Imported:
    out = Imported(TOOL, _model(foreign_recipe))
    for label, config in foreign_recipe["passes"].items():
        for one in config if isinstance(config, list) else [config]:
            if isinstance(one, dict):
                inner = one.get("config")
                _import_pass(
                    label, str(one.get("type", "")), {**one, **(inner if isinstance(inner, dict) else {})}, out
                )
            else:
                out.remark(f"pass `{label}` has no type, so it is left out")
    for key in ("evaluators", "search_strategy", "pass_flows", "systems", "data_configs"):
        if foreign_recipe.get(key):
            out.remark(f"`{key}` has no equivalent here: bounds go into `expect`, data into `data`")
    return out


def _model(body: Mapping[str, Any]) -> str:
    model = body.get("input_model")
    path = model.get("model_path") if isinstance(model, dict) else None
    return path if isinstance(path, str) and path.isprintable() and '"' not in path else ""


def _import_pass(label: str, pass_type: str, args: Mapping[str, Any], imported: Imported) -> None:
    name = pass_type.lower()
    if name in GPTQ or name in ROUND:
        _import_quantization(name, pass_type, args, imported)
    elif name == "sparsegpt":
        _import_sparsity(args, imported)
    elif name in ("lora", "qlora"):
        _import_lora(name, args, imported)
    elif name in EXPORT:
        imported.emits.append("onnx")
    else:
        imported.remark(f"pass `{label}` of type {one_line(pass_type) or 'none'}: effc has nothing that does the same")


def _import_quantization(normalized_type: str, pass_type: str, args: Mapping[str, Any], imported: Imported) -> None:
    bits, group = args.get("bits", 4), args.get("group_size", 128)
    if not integer_text_or_empty(bits, 2, 8):
        imported.remark(f"{one_line(pass_type)}: effc has no grid of {one_line(bits)} bits, so it is left out")
        return
    on, remarks = selector_and_remarks(None, args.get("modules_to_not_convert"))
    args_out = {
        "on": on,
        "bits": str(bits),
        "group": "0" if group == -1 else integer_text_or_empty(group, 1, 1 << 20) or "128",
    }
    if normalized_type in GPTQ:
        args_out["data"] = DATA
        args_out["zero"] = "middle" if args.get("sym") else ""
        args_out["order"] = "given" if args.get("desc_act") is False else ""
        args_out["damping"] = number_text_or_empty(args.get("damp_percent"), 1e-6, 10)
        imported.add("q", "quantize.gptq", args_out, remarks)
    else:
        imported.add("q", "quantize.round", args_out, remarks)


def _import_sparsity(args: Mapping[str, Any], imported: Imported) -> None:
    sparsity = args.get("sparsity", 0.5)
    pair = sparsity if isinstance(sparsity, list) and len(sparsity) == 2 else None
    pattern = f"{pair[0]}:{pair[1]}" if pair else ""
    share = "50%" if pattern in ("2:4", "4:8") else percent_or_empty(sparsity)
    if not share:
        imported.remark(f"SparseGPT: a sparsity of {one_line(sparsity)} has no equivalent here, so it is left out")
        return
    args_out = {"sparsity": f"{share} of weights", "data": DATA, "pattern": f'"{pattern}"' if pattern else ""}
    imported.add(
        "sps", "sparsify.sparsegpt", args_out, ["`layer_interval` has no equivalent here"] * ("layer_interval" in args)
    )


def _import_lora(normalized_type: str, args: Mapping[str, Any], imported: Imported) -> None:
    training = args.get("training_args")
    training = training if isinstance(training, dict) else {}
    args_out = {
        "data": DATA,
        "rank": integer_text_or_empty(args.get("r"), 1, 1024),
        "alpha": number_text_or_empty(args.get("alpha", args.get("lora_alpha")), 1e-3, 1e5),
        "dropout": number_text_or_empty(args.get("lora_dropout"), 0, 0.99),
        "steps": integer_text_or_empty(training.get("max_steps"), 1, 10**9),
        "lr": number_text_or_empty(training.get("learning_rate"), 1e-9, 10),
    }
    remarks = ["the base was quantised while it learned; here it is not"] if normalized_type == "qlora" else []
    imported.add(
        "fit",
        "tune.heal",
        args_out,
        [*remarks, "it learns from the text that its `train_data_config` names: put it in place"],
    )
