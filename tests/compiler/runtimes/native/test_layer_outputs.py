"""Interventions behind layers act on the engine where a hook of torch does, whatever a layer ends with."""

import pytest
import torch
from effc.compiler.ir.capture.capture import capture
from effc.compiler.runtimes.native.adapters import Factors, low_rank_updates_behind_layers
from effc.compiler.runtimes.native.reader import Reader
from effc.dsl.syntax.diagnostics import Reject
from effc.kernels.engine import Engine

from tests import tiny

IDS = list(range(3, 15))


def zero_biases(model):
    """Equal vectors in all layers, which a plan keeps under one name."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and "ln_" not in name:
            parameter.zero_()
    return model


def unit_norms(model):
    """Norms without a weight, behind which a layer ends."""
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def scaled_layers(model):
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.4)
    return model


MODELS = {
    **{
        name: lambda name=name: tiny.model(name)
        for name in ("llama", "gemma2", "granite", "mixtral", "mamba2", "bloom")
    },
    "gpt2 with equal biases": lambda: zero_biases(tiny.model("gpt2")),
    "gemma4 with inputs of layers": lambda: scaled_layers(tiny.model("gemma4_text")),
    "opt with norms behind": lambda: tiny.model("opt", do_layer_norm_before=False),
    "opt with unit norms behind": lambda: unit_norms(tiny.model("opt", do_layer_norm_before=False)),
}


def size(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_update_behind_a_layer_is_what_a_hook_behind_it_gives(name):
    model = MODELS[name]()
    plan = Reader(capture(model), "bf16").build_plan()
    body, weights = plan.to_json(), {key: entry.make() for key, entry in plan.live_weight_entries().items()}
    engine, row, n_layers = Engine(body, weights, 1), torch.tensor([IDS]), 0
    bare = model(row).logits[0].float()
    rounding = size(engine.run(IDS, [0] * len(IDS)) - bare) / size(bare)
    for path, _ in model.named_modules():
        if not path.rpartition(".")[2].isdigit() or path.count(".") > 3 or "experts" in path:
            continue
        assert path in body["layers"], (path, sorted(body["layers"]))
        width = body["registers"][body["layers"][path]]
        draws = torch.Generator().manual_seed(0)
        down, up = torch.randn(2, width, generator=draws) * width**-0.5, torch.randn(width, 2, generator=draws)
        number = engine.add_adapter(low_rank_updates_behind_layers(body, {path: Factors(down, up)}))

        def hook(module, inputs, output, down=down, up=up):
            hidden = output[0] if isinstance(output, tuple) else output
            edited = (hidden + hidden.float() @ down.T @ up.T).to(hidden.dtype)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handle = model.get_submodule(path).register_forward_hook(hook)
        wanted = model(row).logits[0].float()
        handle.remove()
        engine.forget(0)
        error = size(engine.run(IDS, [0] * len(IDS), adapter_of_token=[number] * len(IDS)) - wanted) / size(wanted)
        effect, n_layers = size(bare - wanted) / size(wanted), n_layers + 1
        assert error < max(0.03, 3 * rounding) and error < effect / 3, (path, error, effect, rounding)
    assert n_layers >= 2


@pytest.mark.parametrize(
    "layers", [{}, 5, None, [], "model.layers.0", {"model.layers.0": [3]}, {"model.layers.0": True}]
)
def test_a_layer_that_a_plan_does_not_name_is_refused_whatever_its_file_holds(layers):
    body = Reader(capture(tiny.model("llama")), "bf16").build_plan().to_json()
    with pytest.raises(Reject):
        low_rank_updates_behind_layers(
            {**body, "layers": layers}, {"model.layers.0": Factors(torch.zeros(1, 8), torch.zeros(8, 1))}
        )
