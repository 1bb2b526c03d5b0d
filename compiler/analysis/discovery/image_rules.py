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


def label_convolution_module(rules: "NodeRules", x: Tensor, module: _ConvNd) -> Tensor:
    """[b, c, ...] -> [b, rows, ...]: as `contract`, but each group of rows reads its own group of channels."""
    rows = rules.out.new_labels(len(module.weight))
    if module.bias is not None:
        rules.claim("bias", 0, rows)
    return label_convolution(rules, x, rows, rules.submodule_path(f"{rules.node.target}.weight"), module.groups)


def label_convolution(rules: "NodeRules", x: Tensor, output_labels: Tensor, weight_path: str, groups: int) -> Tensor:
    """Labels of a convolution's output: x with the weight at that path, whose rows have those labels."""
    channels = couple_positions_into_channels(rules, x)
    if groups == 1:
        rules.out.claim_axis(weight_path, 1, channels, is_read=True)
    else:
        # A group goes as a whole: the width of one is a number that all of them share.
        inputs, outputs = channels.view(groups, -1), output_labels.view(groups, -1)
        rules.out.couple(inputs, inputs.amax(1, keepdim=True))
        rules.out.couple(outputs, inputs.amax(1, keepdim=True))
    rules.out.claim_axis(weight_path, 0, output_labels)
    return expand_to_result_shape(rules, output_labels)


def couple_positions_into_channels(rules: "NodeRules", x: Tensor) -> Tensor:
    """One label per channel of [b, c, ...], coupled over all places."""
    by_channel = x.movedim(1, 0).flatten(1)
    rules.out.couple_along(by_channel, 1)
    return by_channel.amax(1)


def expand_to_result_shape(rules: "NodeRules", channels: Tensor) -> Tensor:
    """Labels of channels in the shape of this node's result."""
    shape = rules.node.meta["shape"]
    return channels.view(-1, *(1 for _ in shape[2:])).expand(shape)


def label_pooling(rules: "NodeRules", x: Tensor) -> Tensor:
    """Places of a channel are drawn together, channels stay apart."""
    return expand_to_result_shape(rules, couple_positions_into_channels(rules, x))


def label_channel_norm(rules: "NodeRules", x: Tensor, module: nn.Module) -> Tensor:
    """Statistics of each channel of [b, c, ...], or of a group of them; running ones follow the weight."""
    channels = couple_positions_into_channels(rules, x)
    if module.weight is not None:
        rules.claim("weight", 0, channels)
        rules.claim("bias", 0, channels)
    elif getattr(module, "running_mean", None) is not None:
        rules.out.block_pruning_of(channels, f"{rules.path} keeps statistics of them and has no weight")
    if isinstance(module, nn.GroupNorm):
        groups = channels.view(module.num_groups, -1)
        rules.out.couple(groups, groups.amax(1, keepdim=True))
    return expand_to_result_shape(rules, channels)


RULES = dict.fromkeys(_POOLINGS, lambda rules: label_pooling(rules, rules.args[0]))
