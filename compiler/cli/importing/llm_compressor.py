"""llm-compressor's YAML recipes: stages of groups of modifiers, in the order of the file.

Source: its documentation and `recipe/recipe.py`, `modifiers/`, as of version 0.14.
"""

import re
from collections.abc import Iterator, Mapping
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

TOOL = "llm-compressor"
PRUNING = {
    "SparseGPTModifier": "sparsify.sparsegpt",
    "WandaPruningModifier": "sparsify.wanda",
    "MagnitudePruningModifier": "sparsify.magnitude",
}
QUANTIZING = {
    "GPTQModifier": "quantize.gptq",
    "QuantizationModifier": "quantize.round",
    "AWQModifier": "quantize.round",  # behind a `quantize.scale`
}
NAMES = {"sparsify.sparsegpt": "sps", "sparsify.wanda": "sps", "sparsify.magnitude": "sps"}
# scheme -> (bits, inputs that share a scale; 0 for all, whether activations are quantised, too)
SCHEMES = {
    "W4A16": (4, 128, False),
    "W4A16_ASYM": (4, 128, False),
    "W8A16": (8, 0, False),
    "W8A8": (8, 0, True),
    "INT8": (8, 0, True),
    "W4A8": (4, 128, True),
}


def recognizes(body: Any) -> bool:
    """Whether a file has modifiers anywhere a stage or a group may have them."""
    return any(True for _ in iterate_modifiers(body))


def iterate_modifiers(body: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(class, arguments) of every modifier, whatever its stage and group are called."""
    if isinstance(body, dict):
        for key, value in body.items():
            if re.fullmatch(r"[A-Z]\w*Modifier", key):
                yield key, value if isinstance(value, dict) else {}
            else:
                yield from iterate_modifiers(value)
    elif isinstance(body, list):
        for value in body:
            yield from iterate_modifiers(value)


def import_recipe(foreign_recipe: Any) -> Imported:
    out = Imported(TOOL)
    for name, args in iterate_modifiers(foreign_recipe):
        if name in PRUNING:
            _import_pruning(name, args, out)
        elif name in QUANTIZING:
            _import_quantization(name, args, out)
        else:
            out.remark(f"{name}: effc has nothing that does the same")
    return out


def _import_pruning(modifier: str, args: Mapping[str, Any], imported: Imported) -> None:
    word = PRUNING[modifier]
    share = percent_or_empty(args.get("sparsity", args.get("final_sparsity")))
    if not share:
        imported.remark(
            f"{modifier}: its sparsity {one_line(args.get('sparsity'))} is no share between 0 and 1, so it is left out"
        )
        return
    on, remarks = selector_and_remarks(args.get("targets"), args.get("ignore"))
    args_out = {"on": on, "sparsity": f"{share} of weights"}
    if word != "sparsify.magnitude":
        args_out["data"] = DATA
    mask = str(args.get("mask_structure", "0:0"))
    if mask in ("2:4", "4:8") and word != "sparsify.magnitude":
        args_out["pattern"] = f'"{mask}"'
    elif mask not in ("0:0", "unstructured"):
        remarks.append(f"`mask_structure` {one_line(mask)} has no equivalent here: any weights go")
    if args.get("owl_m") or args.get("sparsity_profile") == "owl":
        args_out["allocation"] = "owl"
    imported.add(
        "sps",
        word,
        args_out,
        remarks + _unsupported_arguments(args, (*_USUAL, "mask_structure", "sparsity", "final_sparsity", *_OWL)),
    )


_USUAL = ("targets", "ignore", "start", "end", "sequential_targets", "sequential_update", "block_size")
_AWQ = ("mappings", "duo_scaling", "n_grid")  # what may be scaled is found, and both kinds of factors are tried
_OWL = ("owl_m", "owl_lmbda", "sparsity_profile", "dampening_frac", "preserve_sparsity_mask", "offload_hessians")


def _import_quantization(modifier: str, args: Mapping[str, Any], imported: Imported) -> None:
    remarks: list[str] = []
    bits, group, active = SCHEMES.get(str(args.get("scheme", "")).upper(), (0, 0, False))
    weights = _weights_of_first_group(args)
    if weights:
        bits, group = weights.get("num_bits", bits), weights.get("group_size", group) or 0
        active = active or _has_activations(args)
    if not integer_text_or_empty(bits, 2, 8):
        imported.remark(
            f"{modifier}: effc has no grid for scheme {one_line(args.get('scheme') or 'of its own')}, so it is left out"
        )
        return
    if active:
        remarks.append("activations were quantised, too, which has no equivalent here: only weights are")
    on, unsaid = selector_and_remarks(args.get("targets"), args.get("ignore"))
    args_out = {"on": on, "bits": str(bits), "group": integer_text_or_empty(group, 1, 1 << 20) or "0"}
    if modifier != "QuantizationModifier" and weights.get(
        "symmetric", str(args.get("scheme", "")).upper() != "W4A16_ASYM"
    ):
        args_out["zero"] = "middle"
    if modifier == "AWQModifier":
        imported.add("s", "quantize.scale", {**args_out, "data": DATA})
    if modifier == "GPTQModifier":
        args_out["data"] = DATA
        if weights.get("actorder") is False:
            args_out["order"] = "given"
        args_out["damping"] = number_text_or_empty(args.get("dampening_frac"), 1e-6, 10)
    known = (*_USUAL, "scheme", "config_groups", "dampening_frac", "actorder", "offload_hessians", *_AWQ)
    imported.add("q", QUANTIZING[modifier], args_out, remarks + unsaid + _unsupported_arguments(args, known))


def _weights_of_first_group(args: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `weights` of the first of `config_groups`."""
    groups = args.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else {}


def _has_activations(args: Mapping[str, Any]) -> bool:
    groups = args["config_groups"]
    return any(isinstance(g, dict) and g.get("input_activations") for g in groups.values())


def _unsupported_arguments(args: Mapping[str, Any], supported: tuple[str, ...]) -> list[str]:
    return [
        f"`{one_line(key)}: {one_line(value)}` has no equivalent here"
        for key, value in args.items()
        if key not in supported
    ]
