"""Label rules of convolutions, pools and norms over channels: tensors are [b, c, ...]."""

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

if TYPE_CHECKING:
    from .labels import NodeRules

MOVING = (nn.Flatten, nn.Unflatten, nn.ConstantPad1d, nn.ConstantPad2d, nn.PixelShuffle, nn.PixelUnshuffle)
NORMS = (_NormBase, nn.GroupNorm)
CONVOLUTIONS = frozenset(kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
POOLS = frozenset(
    kind.forward
    for kind in (
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveMaxPool2d,
        nn.Upsample,
    )
)
_POOLINGS = (
    "max_pool1d",
    "max_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "interpolate",
)


def convolve(step: "NodeRules", x: Tensor, module: _ConvNd) -> Tensor:
    """[b, c, ...] -> [b, rows, ...]: as `contract`, but each group of rows reads its own group of channels."""
    rows = step.out.fresh(len(module.weight))
    if module.bias is not None:
        step.claim("bias", 0, rows)
    return label_convolution(step, x, rows, step.submodule_path(f"{step.node.target}.weight"), module.groups)


def label_convolution(step: "NodeRules", x: Tensor, output_labels: Tensor, weight_path: str, groups: int) -> Tensor:
    """Labels of a convolution's output: x with the weight at that path, whose rows have those labels."""
    channels = channels_of(step, x)
    if groups == 1:
        step.out.claim_axis(weight_path, 1, channels, is_read=True)
    else:
        # A group goes as a whole: the width of one is a number that all of them share.
        inputs, outputs = channels.view(groups, -1), output_labels.view(groups, -1)
        step.out.couple(inputs, inputs.amax(1, keepdim=True))
        step.out.couple(outputs, inputs.amax(1, keepdim=True))
    step.out.claim_axis(weight_path, 0, output_labels)
    return spread(step, output_labels)


def channels_of(step: "NodeRules", x: Tensor) -> Tensor:
    """One label per channel of [b, c, ...], coupled over all places."""
    by_channel = x.movedim(1, 0).flatten(1)
    step.out.couple_along(by_channel, 1)
    return by_channel.amax(1)


def spread(step: "NodeRules", channels: Tensor) -> Tensor:
    """Labels of channels in the shape of this node's result."""
    shape = step.node.meta["shape"]
    return channels.view(-1, *(1 for _ in shape[2:])).expand(shape)


def pool(step: "NodeRules", x: Tensor) -> Tensor:
    """Places of a channel are drawn together, channels stay apart."""
    return spread(step, channels_of(step, x))


def label_channel_norm(step: "NodeRules", x: Tensor, module: nn.Module) -> Tensor:
    """Statistics of each channel of [b, c, ...], or of a group of them; running ones follow the weight."""
    channels = channels_of(step, x)
    if module.weight is not None:
        step.claim("weight", 0, channels)
        step.claim("bias", 0, channels)
    elif getattr(module, "running_mean", None) is not None:
        step.out.block(channels, f"{step.path} keeps statistics of them and has no weight")
    if isinstance(module, nn.GroupNorm):
        groups = channels.view(module.num_groups, -1)
        step.out.couple(groups, groups.amax(1, keepdim=True))
    return spread(step, channels)


RULES = dict.fromkeys(_POOLINGS, lambda step: pool(step, step.args[0]))
