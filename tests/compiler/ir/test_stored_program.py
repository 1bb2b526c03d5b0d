"""Programs in the cache and back."""

import torch
from effc.compiler.core.cache import Cache
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.outcome import Model
from effc.compiler.ir.step_results import StepResults

from tests import tiny
from tests.recipes_in_memory import origin_of


def test_tensors_of_equal_numbers_are_apart_in_a_restored_program(tmp_path):
    model, key = tiny.model("llama"), "k" * 64
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1.0)
    cache, origin = Cache(tmp_path), origin_of(model)
    StepResults(cache, origin).save_outcome(key, Model(capture(origin.load())), {}, {"program": [], "summary": ""})
    first, *others = StepResults(cache, origin).load_outcome(key).program.model.model.layers
    with torch.no_grad():
        first.input_layernorm.weight.mul_(3.0)
    assert others and all((layer.input_layernorm.weight == 1).all() for layer in others)
