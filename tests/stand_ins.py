"""Recipes of the library on models that are here, where they name others."""

import re
from pathlib import Path

ZOO = Path(__file__).parents[1] / "recipes" / "zoo" / "tiny-llama"


def embedded(text: str) -> str:
    """A recipe of a model that is not here, on one that is: with its data, in steps that it has."""
    text = re.sub(r"(model base = )hf\(.*\)", r'\1zoo("tiny-llama")', text)
    text = re.sub(r"hub\([^)]*\)", f'text("{ZOO}/calib.txt", samples: 4, length: 64, seed: 7)', text)
    return re.sub(r"group: \d+", "group: 32", text)


def named_model(text: str) -> str:
    """The model on the hub that a recipe names, else ""."""
    found = re.search(r'model base = hf\("([^"]+)"', text)
    return found[1] if found else ""


def on_model(text: str, model: str) -> str:
    """A recipe of the embedded model on another one, `gguf("a.gguf")`; paths of data lead to where they led."""
    return re.sub(r'"(?:\.\./)*zoo/tiny-llama/', f'"{ZOO}/', text.replace('zoo("tiny-llama")', model))
