"""A causal language model as a function of tokens and of the keys and values of those before."""

from typing import Any

from torch import Tensor, nn

KEEPS = "ONNX has no standard op for it; `hf` and `native` hold it"


class Decoder(nn.Module):
    """Logits, and keys and values layer by layer; masks and positions reach over the tokens before.

    inputs  input_ids [b, t], attention_mask [b, past + t] and, where the model takes some, position_ids [b, t]
    past    keys and values in turns, each [b, heads, past, d]; of layers without attention none
    slots   where in the cache they belong
    """

    def __init__(self, model: nn.Module, slots: list[int]):
        super().__init__()
        self.model, self.slots = model, slots

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        cache = cache_of_past_key_values(past, self.slots)
        logits = self.model(**inputs, cache=cache, use_cache=True).logits
        return logits.float(), [part for n in self.slots for part in (cache.layers[n].keys, cache.layers[n].values)]


def cache_of_past_key_values(past_key_values: list[Tensor], layer_indices: list[int]) -> Any:
    """A cache with keys and values in it; it never forgets, as windows are in the mask."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, layer_index in enumerate(layer_indices):
        cache.update(past_key_values[2 * i], past_key_values[2 * i + 1], layer_index)
    return cache
