"""Normalisation of images, and its statistics: published ones by name, or those of the training images."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Normalization = Literal["train", "cifar10", "imagenet32", "none"]


#: Mean and standard deviation of each channel, of images in [0, 1].
ChannelStatistics = tuple[Sequence[float], Sequence[float]]
PUBLISHED: dict[str, ChannelStatistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet32": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def channel_statistics(blocks: Iterable[Tensor]) -> ChannelStatistics:
    """Mean and (population) standard deviation of each channel, computed exactly from its histogram in float64.

    A channel that is the same everywhere has a standard deviation of 0 and gets 1 instead, to be divided by.

    Args:
        blocks: The images in any number of parts, each uint8 [images, channels, height, width], so that a set that does
            not fit into memory can be had block by block; at least one image.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    histograms = [
        torch.stack([torch.bincount(c.flatten(), minlength=256) for c in block.unbind(1)]) for block in blocks
    ]
    counts = torch.stack(histograms).sum(0).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    constant = (counts > 0).sum(1) == 1
    std = torch.where(constant, 1.0, variance.sqrt())
    return mean.tolist(), std.tolist()


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scales bytes to [0, 1] and standardises each channel: `(images / 255 - mean) / std`.

    Args:
        images: uint8 [batch, channels, height, width].
        mean: float32 [channels], of images in [0, 1].
        std: float32 [channels], of images in [0, 1].

    Returns:
        float32 [batch, channels, height, width].
    """
    return (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
