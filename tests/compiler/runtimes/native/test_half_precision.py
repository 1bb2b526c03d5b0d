"""Checkpoints of half precision: their plans are those of the same numbers in float32, whatever the architecture."""

import copy

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.reader import Reader

from tests import mixers
from tests.compiler.runtimes.native.test_plans import NATIVE, STATEFUL

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def plan_of(model):
    return Reader(capture(model), "bf16").build_plan()


def as_published(name, dtype):
    """A model of half precision as loading makes it: buffers that no checkpoint holds stay float32."""
    model = mixers.model(name)
    stored = model.state_dict()
    kept = {path: b.clone() for path, b in model.named_buffers() if path not in stored and b.is_floating_point()}
    model.to(dtype)
    for path, buffer in model.named_buffers():
        buffer.data = kept.get(path, buffer.data)
    return model


EVERY = [  # both types cross all architectures in `heavy`
    pytest.param(name, half, marks=() if half == "bf16" or name in (NATIVE[0], STATEFUL[0]) else pytest.mark.heavy)
    for name in (*NATIVE, *STATEFUL)
    for half in HALVES
]


@pytest.mark.parametrize(("name", "half"), EVERY)
def test_a_model_of_half_precision_has_the_plan_of_its_numbers_in_float32(name, half):
    model = as_published(name, HALVES[half])
    found, wanted = plan_of(model), plan_of(copy.deepcopy(model).float())
    assert found.to_json() == wanted.to_json()
    theirs = wanted.live_weight_entries()
    for entry_name, entry in found.live_weight_entries().items():
        ours, other = entry.make(), theirs[entry_name].make()
        assert ours.dtype == other.dtype and torch.equal(ours, other), entry_name
