"""`genai_config.json`: the folder of a decoder as onnxruntime-genai opens it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...core.json_errors import reject_on_error
from ...core.safe_read import CONFIG, read_json
from .checking import FILE, OnnxFile, read_checked_onnx
from .refusal import rejected_onnx

NAME = "genai_config.json"
TYPE = "decoder"  # which adds nothing to the names of inputs; types of architectures may, as `phi3`
UNBOUND = 1 << 20  # positions of a model that states no limit
_NO_TOKEN = -1
_INPUTS = ("input_ids", "attention_mask", "position_ids")
_CACHE = {
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}
_LOG_ID = "onnxruntime-genai"
_TEXTS = frozenset((TYPE, _LOG_ID, FILE, "logits", *_INPUTS, *_CACHE.values()))
_REMEDY = f"delete {NAME}, which effc does not read, or compile again"
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}  # transformers' own defaults
_FIELDS = frozenset(
    (
        "model",
        "search",
        "type",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "context_length",
        "vocab_size",
        "decoder",
        "session_options",
        "log_id",
        "provider_options",
        "filename",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_size",
        "inputs",
        "outputs",
        "logits",
        "do_sample",
        "max_length",
        "num_beams",
        "past_present_share_buffer",
    )
).union(_INPUTS, _CACHE, _SAMPLING)


def write_genai_config_and_describe(model: PreTrainedModel, folder: Path) -> str:
    """Write the file beside the graph of a decoder. Returns a sentence: what opens the folder, or why nothing does."""
    stored = read_checked_onnx(folder)
    problem = _graph_problem(stored)
    if problem:
        return f"onnxruntime-genai can't run it: {problem}."
    text = json.dumps(_genai_config(model, stored), indent=2)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")
    return f'onnxruntime-genai opens the folder: `onnxruntime_genai.Model("{folder.name}")`.'


def check_genai_config(folder: Path) -> None:
    """Reject (refused-onnx) a config with fields or texts that effc does not write: it may name files and libraries."""
    file = folder / NAME
    if not file.is_file():
        return
    with reject_on_error(rejected_onnx, f"{file} is no JSON", _REMEDY):
        unknown = next(_unknown_content(read_json(file, CONFIG, folder)), None)
    if unknown is not None:
        raise rejected_onnx(f"{file} has {unknown}, which effc does not write", help=_REMEDY).rejection()


def _unknown_content(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, content in value.items():
            yield from [] if name in _FIELDS else [f"a field `{name[:80]}`"]
            yield from _unknown_content(content)
    elif isinstance(value, list):
        for item in value:
            yield from _unknown_content(item)
    elif isinstance(value, str) and value not in _TEXTS:
        yield f"the text `{value[:80]}`"


def _graph_problem(stored: OnnxFile) -> str | None:
    """Reason why the library could not run a graph: it fills these inputs, and shapes values as keys."""
    further = [n for n in stored.inputs if n not in _INPUTS and not n.startswith("past_key_values.")]
    if further:
        return f"the model takes `{further[0]}`, too"
    shapes = _cache_shapes(stored)
    unequal = next((n for n, s in shapes.items() if n.endswith(".key") and shapes[f"{n[:-4]}.value"] != s), None)
    return f"the shapes of `{unequal}` and its values differ" if unequal else None


def _cache_shapes(stored: OnnxFile) -> dict[str, tuple[int, int]]:
    """Heads and size of a head of each input of keys or values."""
    dims = {i.name: i.type.tensor_type.shape.dim for i in stored.model.graph.input}
    return {n: (d[1].dim_value, d[3].dim_value) for n, d in dims.items() if n.startswith("past_key_values.")}


def _genai_config(model: PreTrainedModel, stored: OnnxFile) -> dict[str, Any]:
    """Content of the file. Layers may differ in heads: the library takes those of each from the graph's inputs."""
    shapes = _cache_shapes(stored)
    heads, head_size = next(iter(shapes.values()))
    eos = _token(model, "eos_token_id")
    pad = _token(model, "pad_token_id")
    context = stored.facts["context"] or UNBOUND
    names = {name: text for name, text in _CACHE.items() if name.startswith("past")}
    generation = model.generation_config
    sampling = {name: getattr(generation, name, None) for name in _SAMPLING}
    return {
        "model": {
            "type": TYPE,
            "bos_token_id": _first(_token(model, "bos_token_id")),
            "eos_token_id": _NO_TOKEN if eos is None else eos,
            "pad_token_id": _first(eos if pad is None else pad),
            "context_length": context,
            "vocab_size": stored.model.graph.output[0].type.tensor_type.shape.dim[2].dim_value,
            "decoder": {
                "session_options": {"log_id": _LOG_ID, "provider_options": []},
                "filename": FILE,
                "num_hidden_layers": len(shapes) // 2,
                "num_key_value_heads": heads,
                "head_size": head_size,
                "inputs": {**{name: name for name in _INPUTS if name in stored.inputs}, **names},
                "outputs": {"logits": "logits", **{n: text for n, text in _CACHE.items() if n.startswith("present")}},
            },
        },
        "search": {
            "do_sample": bool(getattr(generation, "do_sample", False)),
            "max_length": context,
            "num_beams": 1,
            # The graph gives keys and values that are longer than those it takes.
            "past_present_share_buffer": False,
            **{name: _SAMPLING[name] if value is None else value for name, value in sampling.items()},
        },
    }


def _token(model: PreTrainedModel, name: str) -> Any:
    """Ids of a token as the model's configs state them, None where they state none."""
    stated = (getattr(config, name, None) for config in (model.generation_config, model.config.get_text_config()))
    return next((value for value in stated if value is not None), None)


def _first(value: Any) -> int:
    tokens = value if isinstance(value, list) else [value]
    return next((token for token in tokens if token is not None), _NO_TOKEN)
