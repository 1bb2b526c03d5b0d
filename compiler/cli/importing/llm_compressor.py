"""llm-compressor's YAML recipes: stages of groups of modifiers, in the order of the file.

Source: its documentation and `recipe/recipe.py`, `modifiers/`, as of version 0.14.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .steps import DATA, Imported, integer, number, percent, plain, selector_text

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


def is_one(body: Any) -> bool:
    """Whether a file has modifiers anywhere a stage or a group may have them."""
    return any(True for _ in modifiers(body))


def modifiers(body: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(class, arguments) of every modifier, whatever its stage and group are called."""
    if isinstance(body, dict):
        for key, value in body.items():
            if re.fullmatch(r"[A-Z]\w*Modifier", key):
                yield key, value if isinstance(value, dict) else {}
            else:
                yield from modifiers(value)
    elif isinstance(body, list):
        for value in body:
            yield from modifiers(value)


def import_recipe(body: Any) -> Imported:
    out = Imported(TOOL)
    for name, args in modifiers(body):
        if name in PRUNING:
            _import_pruning(name, args, out)
        elif name in QUANTIZING:
            _import_quantization(name, args, out)
        else:
            out.remark(f"{name}: effc has nothing that does the same")
    return out


def _import_pruning(name: str, args: Mapping[str, Any], out: Imported) -> None:
    word = PRUNING[name]
    share = percent(args.get("sparsity", args.get("final_sparsity")))
    if not share:
        out.remark(f"{name}: its sparsity {plain(args.get('sparsity'))} is no share between 0 and 1, so it is left out")
        return
    on, remarks = selector_text(args.get("targets"), args.get("ignore"))
    args_out = {"on": on, "sparsity": f"{share} of weights"}
    if word != "sparsify.magnitude":
        args_out["data"] = DATA
    mask = str(args.get("mask_structure", "0:0"))
    if mask in ("2:4", "4:8") and word != "sparsify.magnitude":
        args_out["pattern"] = f'"{mask}"'
    elif mask not in ("0:0", "unstructured"):
        remarks.append(f"`mask_structure` {plain(mask)} has no equivalent here: any weights go")
    if args.get("owl_m") or args.get("sparsity_profile") == "owl":
        args_out["allocation"] = "owl"
    out.add(
        "sps", word, args_out, remarks + _unsaid(args, (*_USUAL, "mask_structure", "sparsity", "final_sparsity", *_OWL))
    )


_USUAL = ("targets", "ignore", "start", "end", "sequential_targets", "sequential_update", "block_size")
_AWQ = ("mappings", "duo_scaling", "n_grid")  # what may be scaled is found, and both kinds of factors are tried
_OWL = ("owl_m", "owl_lmbda", "sparsity_profile", "dampening_frac", "preserve_sparsity_mask", "offload_hessians")


def _import_quantization(name: str, args: Mapping[str, Any], out: Imported) -> None:
    remarks: list[str] = []
    bits, group, active = SCHEMES.get(str(args.get("scheme", "")).upper(), (0, 0, False))
    weights = _weights(args)
    if weights:
        bits, group = weights.get("num_bits", bits), weights.get("group_size", group) or 0
        active = active or _has_activations(args)
    if not integer(bits, 2, 8):
        out.remark(
            f"{name}: effc has no grid for scheme {plain(args.get('scheme') or 'of its own')}, so it is left out"
        )
        return
    if active:
        remarks.append("activations were quantised, too, which has no equivalent here: only weights are")
    on, unsaid = selector_text(args.get("targets"), args.get("ignore"))
    args_out = {"on": on, "bits": str(bits), "group": integer(group, 1, 1 << 20) or "0"}
    if name != "QuantizationModifier" and weights.get("symmetric", str(args.get("scheme", "")).upper() != "W4A16_ASYM"):
        args_out["zero"] = "middle"
    if name == "AWQModifier":
        out.add("s", "quantize.scale", {**args_out, "data": DATA})
    if name == "GPTQModifier":
        args_out["data"] = DATA
        if weights.get("actorder") is False:
            args_out["order"] = "given"
        args_out["damping"] = number(args.get("dampening_frac"), 1e-6, 10)
    known = (*_USUAL, "scheme", "config_groups", "dampening_frac", "actorder", "offload_hessians", *_AWQ)
    out.add("q", QUANTIZING[name], args_out, remarks + unsaid + _unsaid(args, known))


def _weights(args: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `weights` of the first of `config_groups`."""
    groups = args.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    return weights if isinstance(weights, dict) else {}


def _has_activations(args: Mapping[str, Any]) -> bool:
    groups = args["config_groups"]
    return any(isinstance(g, dict) and g.get("input_activations") for g in groups.values())


def _unsaid(args: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    return [f"`{plain(key)}: {plain(value)}` has no equivalent here" for key, value in args.items() if key not in known]
