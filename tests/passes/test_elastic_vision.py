"""supernet.elastic on models of images: convolutions, their norms, and what they can't leave out."""

import copy
import json
from functools import cache

import pytest
import torch
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.analysis.planning import shrink
from effc.compiler.core.journal import Journal
from effc.compiler.ir.capture.capture import capture
from effc.compiler.ir.edits import Edits, replay_edits
from effc.compiler.ir.outcome import Model
from effc.compiler.transforms.supernet.choices import ChoiceSampler, Space
from effc.compiler.transforms.supernet.elastic_dims import (
    depth_dims,
    items_least_important_first,
    kernel_dims,
    maskable_groups,
    narrowable_groups,
    width_dims,
)
from effc.compiler.transforms.supernet.family import Family
from effc.compiler.transforms.supernet.kernels import identity_crop_matrices
from effc.compiler.transforms.supernet.norms import batch_norms
from effc.compiler.transforms.supernet.objectives import ClassificationObjective, SubnetObjective
from effc.dsl.checker.values import DataRef, Ratio
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
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


class Padded(nn.Conv2d):
    """Puts zeros around what it is given by a module of its own, as those of EfficientNet-lite do."""

    def __init__(self, *sizes, pads, **more):
        super().__init__(*sizes, bias=False, **more)
        self.around = nn.ZeroPad2d(pads)

    def forward(self, x):
        return self._conv_forward(self.around(x), self.weight, None)


class Inverted(nn.Module):
    """An inverted residual with a kernel of five."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.expand, self.norm1 = Padded(inside, 32, 1, pads=0), nn.BatchNorm2d(32)
        self.depthwise = Padded(32, 32, 5, stride=stride, groups=32, pads=(2, 2, 2, 2) if stride == 1 else (1, 2, 1, 2))
        self.norm2, self.project = nn.BatchNorm2d(32), Padded(32, outside, 1, pads=0)
        self.keeps = inside == outside and stride == 1

    def forward(self, x):
        y = self.norm1(self.expand(x)).relu()
        y = self.project(self.norm2(self.depthwise(y)).relu())
        return x + y if self.keeps else y


class SelfPadding(nn.Module):
    """Convolutions that no config describes."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = Padded(3, 16, 3, stride=2, pads=(0, 1, 0, 1)), nn.Linear(16, 5)
        self.blocks = nn.ModuleList([Inverted(16, 16, 1), Inverted(16, 16, 2), Inverted(16, 16, 1)])
        self.dummy_inputs = {"inputs": images(2)}

    def forward(self, inputs):
        x = self.stem(inputs)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def logits(model, shown):
    found = model(shown)
    return getattr(found, "logits", found)


def images(count, seed=0):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@cache
def family_of(name):
    """What may be chosen of a tiny model whose norms are no identities, with nothing trained."""
    torch.manual_seed(0)
    model = SelfPadding() if name == "lite" else AutoModelForImageClassification.from_config(CONFIGS[name])
    model.eval()
    for norm in batch_norms(model):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    program, dims, elastic = capture(model), [], []
    for kind in ("channels", "heads"):
        groups = narrowable_groups(skeleton_of(program), None, kind)
        elastic += (groups := maskable_groups(program, groups, width_dims(groups, HALF, "layer", 1)))
        dims += width_dims(groups, HALF, "layer", 1)
    dims += [*kernel_dims(program, None, [5, 3], "layer"), *depth_dims(program, None, "blocks")]
    space = Space(tuple(dims))
    learned = {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in identity_crop_matrices(space).items()}
    return Family(program, "", space, orders=items_least_important_first(program, elastic), crops=learned)


def alone(family, choice):
    bare = capture(copy.deepcopy(family.program.model))
    shared = {"orders": family.orders, "weights": family.weights, "norms": family.norms, "crops": family.crops}
    return Family(bare, "", family.space, **shared).cut_program_to_choice(choice)


@torch.no_grad()
@pytest.mark.parametrize("norms", [False, True], ids=["kept", "measured"])
@pytest.mark.parametrize("name", wide((*CONFIGS, "lite"), ("vit", "resnet", "lite")))
@pytest.mark.slow
def test_a_choice_computes_masked_what_it_does_cut_out(name, norms):
    family, shown = family_of(name), images(3)
    model = family.program.model
    family.norms = images(16, 1) if norms else None
    start, before = logits(model, shown), [n.running_mean.clone() for n in batch_norms(model)]
    space = family.space
    assert "channels" in {d.kind for d in space.dims}
    with family.with_switchable_choice() as take:
        take(space.choice("largest"))
        assert torch.equal(logits(model, shown), start)
    for choice in (space.choice("smallest"), space.draw(1)):
        with family.with_choice_applied(choice):
            masked = logits(model, shown)
        cut = alone(family, choice)
        assert torch.allclose(logits(cut.model, shown), masked, atol=1e-4, rtol=1e-4)
        assert shrink.param_count(family.smaller_skeleton(choice)) == sum(p.numel() for p in cut.model.parameters())
        if norms and name in ("resnet", "mobilenet"):  # of EfficientNet only what its last norm gives may be narrower
            family.norms = None
            assert not torch.allclose(alone(family, choice).model(shown).logits, masked, atol=1e-4, rtol=1e-4)
            family.norms = images(16, 1)
    assert torch.equal(logits(model, shown), start)
    assert all(torch.equal(n.running_mean, kept) for n, kept in zip(batch_norms(model), before, strict=True))


@pytest.mark.slow
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
    from effc.dsl.checker.recipe import Invocation

    recipe.data["digits"] = Invocation(
        "images", {**defaults("data", "images"), "path": "digits.safetensors", "classes": classes}
    )
    ctx = context_of(tmp_path, model, recipe)
    step = ctx.registry.make("pass", recipe.pipelines["lean"].steps[0].call)
    return step.result_of(Model(capture(model)), ctx)


@pytest.mark.slow
@torch.no_grad()
def test_a_family_that_learned_from_images_has_norms_of_its_own_for_every_choice(tmp_path):
    with torch.enable_grad():
        family = trained(tmp_path, "resnet", kernels=[5, 3])
    learned = family.crops["resnet.embedder.embedder.convolution 3"]
    assert learned.shape == (9, 9) and not torch.equal(learned, torch.eye(9))
    again = Family.from_json_assigning_weights(
        family.to_json(), capture(copy.deepcopy(family.program.model)), family.stored
    )
    for choice in (family.space.choice("largest"), family.space.choice("smallest")):
        with family.with_choice_applied(choice):
            masked = family.program.model(images(3)).logits
        with again.with_choice_applied(choice):
            assert torch.allclose(again.program.model(images(3)).logits, masked, atol=1e-5)
        assert torch.allclose(alone(family, choice).model(images(3)).logits, masked, atol=1e-4)


@pytest.mark.slow
def test_what_images_and_their_models_can_not_do_is_refused(tmp_path):
    with pytest.raises(Reject, match="no-classes"):
        trained(tmp_path, "vit", classes=None)
    with pytest.raises(Reject, match="one-choice") as caught:
        trained(tmp_path, "resnet", depth="layers", steps=0)
    assert "depth: blocks" in caught.value.diagnostics[0].help
    with pytest.raises(Reject, match="one-choice") as caught:
        trained(tmp_path, "resnet", kernels=[9, 7], steps=0)
    assert "smaller sizes" in caught.value.diagnostics[0].help


def test_kernels_of_convolutions_have_a_dial_where_their_zeros_can_shrink_with_them():
    for name, sizes in (("resnet", {(7, 5, 3)}), ("efficientnet", {(5, 3)}), ("lite", {(5, 3)}), ("vit", set())):
        found = family_of(name).space.of("kernel")
        assert {dim.values for dim in found} == sizes, name
    assert len(family_of("lite").space.of("kernel")) == 3
    assert {g.kind for g in family_of("lite").space.of("channels")} == {"channels"}, (
        "convolutions that pad by themselves"
    )
    bare = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 4, 5, padding=1))
    bare.dummy_inputs = {"input": images(2)}
    assert kernel_dims(capture(bare), None, [3], "layer")[0].places == ("2",), "no zeros, so that less comes out"


@torch.no_grad()
def test_a_smaller_kernel_replays_from_stored_edits(tmp_path):
    family = family_of("lite")
    choice = family.space.choice("smallest")
    cut = alone(family, choice)
    again = SelfPadding().eval()
    replay_edits(again, Edits.from_json(json.loads(json.dumps(cut.edits.to_json()))))
    again.load_state_dict(cut.model.state_dict())
    assert torch.allclose(logits(again, images(3)), logits(cut.model, images(3)), atol=1e-5)
    assert again.blocks[1].depthwise.kernel_size == (3, 3) and again.blocks[1].depthwise.around.padding == [0, 1, 0, 1]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", wide((*CONFIGS, "lite"), ("vit", "resnet", "lite")))
def test_operations_of_an_image_are_those_that_torch_counts_of_the_smaller_network(name):
    family = family_of(name)
    for choice in (family.space.choice("largest"), family.space.choice("smallest"), family.space.draw(1)):
        model = alone(family, choice).model
        if name == "vit":
            model.set_attn_implementation("eager")  # of the fused one on CPUs torch counts nothing
        with FlopCounterMode(display=False) as counted:
            model(**{name: value[:1] for name, value in family.program.inputs.items() if torch.is_tensor(value)})
        assert shrink.flops_per_token(family.smaller_skeleton(choice), 512) == counted.get_total_flops()


def test_what_smaller_choices_learn_does_not_follow_from_running_statistics(tmp_path):
    """These are of all choices of the steps before, mixed: no network's, and so none to teach by."""
    gradients = []
    for shift in (0.0, 1.0):
        model = copy.deepcopy(family_of("resnet").program.model).train()
        for norm in batch_norms(model):
            norm.running_mean += shift
        sampler = ChoiceSampler(family_of("resnet").space, 0, sandwich=True)
        sampler.draw_and_activate_first(1)
        objective = ClassificationObjective(model, images(8), None, torch.arange(8) % 5, "digits")
        lesson = SubnetObjective(objective, sampler, Journal(tmp_path / f"{shift}.jsonl"), share=0.9)
        lesson.accumulate_gradients(torch.arange(8), 1.0)
        gradients.append(model.classifier[1].weight.grad)
    assert torch.allclose(*gradients)
