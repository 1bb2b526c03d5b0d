"""Architectures that a config of common names makes: none has a plan that is wrong, and none ends in a traceback."""

import pytest
import torch

from tests.native.survey import made, verdict
from tests.native.test_engine_models import alike, assert_near, native_of, rows_of

torch.set_num_threads(1)
ROUTED = ("olmoe", "granitemoe", "glm4_moe", "afmoe", "ernie4_5_moe", "hunyuan_v1_moe")
LATENT = ("deepseek_v2", "deepseek_v3", "minicpm3")
WRITTEN = ("falcon", "ministral3")  # products of its own, queries that grow with the position


@pytest.mark.parametrize("name", (*ROUTED, *LATENT, *WRITTEN))
def test_a_plan_computes_what_torch_does(name):
    assert verdict(made(name)) == ("ok", "")


def test_keys_and_values_that_are_made_of_latents_are_what_the_engine_caches():
    model = alike(made("deepseek_v3"))
    native, ids = native_of(model), torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(3))
    wanted = rows_of(model, ids, torch.ones_like(ids))
    output = native(ids[:, :20], use_cache=True)
    assert_near(output.logits, wanted[:, :20])
    for at in range(20, 40):
        output = native(ids[:, at : at + 1], cache=output.cache)
        assert_near(output.logits, wanted[:, at : at + 1])
