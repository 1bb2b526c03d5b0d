"""supernet.elastic on models of images: convolutions, their norms, and what they can't leave out."""

import copy
from functools import cache

import pytest
import torch
from effc.compiler.capture.capture import capture
from effc.compiler.families.choices import Space
from effc.compiler.families.dials import able, chosen, depth_dials, orders, width_dials
from effc.compiler.families.family import Family
from effc.compiler.families.norms import batch_norms
from effc.compiler.ir.outcome import Model
from effc.compiler.planning import shrink
from effc.dsl.diagnostics import Reject
from effc.dsl.values import DataRef, Ratio
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageClassification, EfficientNetConfig, MobileNetV2Config, ResNetConfig, ViTConfig

from tests.grids import wide
from tests.recipes_in_memory import context_of, recipe_of
from tests.worlds import defaults

HALF = [Ratio(1.0), Ratio(0.5)]
CONFIGS = {
    "vit": ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=5,
    ),
    "resnet": ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 48], depths=[2, 2], layer_type="bottleneck", num_labels=5
    ),
    "mobilenet": MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=5),
    "efficientnet": EfficientNetConfig(
        image_size=32,
        hidden_dim=1280,
        kernel_sizes=[3, 5],
        in_channels=[32, 16],
        out_channels=[16, 24],
        depthwise_padding=[],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 4],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        num_labels=5,
    ),
}


def images(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@cache
def family_of(name):
    """What may be chosen of a tiny model whose norms are no identities, with nothing trained."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(CONFIGS[name]).eval()
    for norm in batch_norms(model):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    program, dials, elastic = capture(model), [], []
    for kind in ("channels", "heads"):
        groups = chosen(program.skeleton, None, kind)
        elastic += (groups := able(program, groups, width_dials(groups, HALF, "layer", 1)))
        dials += width_dials(groups, HALF, "layer", 1)
    space = Space((*dials, *depth_dials(program, None, "blocks")))
    return Family(program, "", space, orders=orders(program, elastic))


def alone(family, choice):
    fresh = capture(copy.deepcopy(family.program.model))
    return Family(fresh, "", family.space, orders=family.orders, weights=family.weights, norms=family.norms).cut(choice)


@torch.no_grad()
@pytest.mark.parametrize("norms", [False, True], ids=["kept", "measured"])
@pytest.mark.parametrize("name", wide(tuple(CONFIGS), ("vit", "resnet")))
def test_a_choice_computes_masked_what_it_does_cut_out(name, norms):
    family, shown = family_of(name), images(3)
    model = family.program.model
    family.norms = images(16, 1) if norms else None
    start, before = model(shown).logits, [n.running_mean.clone() for n in batch_norms(model)]
    space = family.space
    assert "channels" in {d.kind for d in space.dials}
    with family.running() as take:
        take(space.choice("largest"))
        assert torch.equal(model(shown).logits, start)
    for choice in (space.choice("smallest"), space.draw(1)):
        with family.applied(choice):
            masked = model(shown).logits
        cut = alone(family, choice)
        assert torch.allclose(cut.model(shown).logits, masked, atol=1e-4, rtol=1e-4)
        assert shrink.params(family.smaller(choice)) == sum(p.numel() for p in cut.model.parameters())
        if norms and name in ("resnet", "mobilenet"):  # of EfficientNet only what its last norm gives may be narrower
            family.norms = None
            assert not torch.allclose(alone(family, choice).model(shown).logits, masked, atol=1e-4, rtol=1e-4)
            family.norms = images(16, 1)
    assert torch.equal(model(shown).logits, start)
    assert all(torch.equal(n.running_mean, kept) for n, kept in zip(batch_norms(model), before, strict=True))


@torch.no_grad()
def test_measured_statistics_are_means_and_variances_of_what_a_norm_is_given():
    family = family_of("resnet")
    family.norms, seen = images(32, 1), {}
    cut = alone(family, family.space.choice("smallest"))
    first = batch_norms(cut.model)[0]
    first.register_forward_pre_hook(lambda module, args: seen.setdefault("x", args[0]))
    cut.model(family.norms)
    assert torch.allclose(first.running_mean, seen["x"].mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(first.running_var, seen["x"].var((0, 2, 3)), atol=1e-4)


def trained(tmp_path, name, classes="labels", **args):
    model = copy.deepcopy(family_of(name).program.model)
    save_file({"images": images(32, 2), "labels": torch.arange(32) % 5}, tmp_path / "digits.safetensors")
    made = {"data": DataRef("digits"), "channels": HALF, "train": "weights", "steps": 3, "batch": 8, "align": 4, **args}
    recipe = recipe_of([("net", "supernet.elastic", {**defaults("pass", "supernet.elastic"), **made})])
    from effc.dsl.recipe import Invocation

    recipe.data["digits"] = Invocation(
        "images", {**defaults("data", "images"), "path": "digits.safetensors", "classes": classes}
    )
    ctx = context_of(tmp_path, model, recipe)
    step = ctx.shelf.make("pass", recipe.pipelines["lean"].steps[0].call)
    return step.give(Model(capture(model)), ctx)


@torch.no_grad()
def test_a_family_that_learned_from_images_has_norms_of_its_own_for_every_choice(tmp_path):
    with torch.enable_grad():
        family = trained(tmp_path, "resnet")
    again = Family.from_json(family.to_json(), capture(copy.deepcopy(family.program.model)), family.stored)
    for choice in (family.space.choice("largest"), family.space.choice("smallest")):
        with family.applied(choice):
            masked = family.program.model(images(3)).logits
        with again.applied(choice):
            assert torch.allclose(again.program.model(images(3)).logits, masked, atol=1e-5)
        assert torch.allclose(alone(family, choice).model(images(3)).logits, masked, atol=1e-4)


def test_what_images_and_their_models_can_not_do_is_refused(tmp_path):
    with pytest.raises(Reject, match="no-classes"):
        trained(tmp_path, "vit", classes=None)
    with pytest.raises(Reject, match="one-choice") as caught:
        trained(tmp_path, "resnet", depth="layers", steps=0)
    assert "depth: blocks" in caught.value.diagnostics[0].help
