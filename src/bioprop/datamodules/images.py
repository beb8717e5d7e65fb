"""Images of a loader, in memory or in a file that is mapped into it; and what becomes of them in a batch."""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

BLOCK = 8192


class MappedImages:
    """Some images of a file, in an order of their own; the file's pages are shared by all processes that map it.

    Nothing is read before it is asked for, and nothing is copied but what is handed out.

    Args:
        stored: uint8 [stored images, channels, height, width], read from the file as its parts are used.
        places: int64 [images]: which of them, in which order.
    """

    device = torch.device("cpu")

    def __init__(self, stored: np.ndarray, places: Tensor) -> None:
        self.stored = stored
        self.places = places
        self.shape = (len(places), *stored.shape[1:])

    def __len__(self) -> int:
        return len(self.places)

    def index_select(self, dim: int, index: Tensor, /) -> Tensor:
        """Returns some of these images, uint8 [len(index), channels, height, width], copied out of the file."""
        places = self.places.index_select(0, index).numpy()
        # Read in the order of the file: what is not in the operating system's cache yet comes faster. By
        # numpy, because torch has no read-only tensors.
        order = places.argsort()
        images = np.empty((len(places), *self.stored.shape[1:]), dtype=np.uint8)
        images[order] = np.take(self.stored, places[order], axis=0)
        return torch.from_numpy(images)


#: uint8 [images, channels, height, width]: a tensor, or what has its `len`, `shape`, `device` and `index_select`.
Images: TypeAlias = Tensor | MappedImages


def blocks(images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Gives all images once, some thousands at a time, in the order in which a disk gives them fastest.

    Yields:
        Places among the images, int64 [block], and the images there, uint8 [block, channels, height, width].
    """
    order = images.places.argsort() if isinstance(images, MappedImages) else torch.arange(len(images))
    for block in torch.split(order, BLOCK):
        yield block, images.index_select(0, block)


def copy_to(device: torch.device, images: Images) -> Tensor:
    """Copies images to a device, a block at a time."""
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for block, part in blocks(images):
        copy.index_copy_(0, block.to(device), part.to(device))
    return copy


def crop_and_flip(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Crops every image out of itself padded by repeating its edge, then mirrors it left to right where told.

    `out[b, c, y, x] = images[b, c, clamp(y + dy_b - padding), clamp(x' + dx_b - padding)]`, where `x' = width - 1 - x`
    for a mirrored image and `x' = x` otherwise. Clamping an index to the image is edge padding without a padded copy.
    torchvision's transforms draw one random number for a whole batch; here every image has its own.

    Args:
        images: [batch, channels, height, width], any type of number, on any device.
        draws: int64 [batch, 3]: vertical offset `dy` and horizontal offset `dx` of the crop in pixels, both in
            0..2 * padding (`padding` is the image itself), and 1 for an image to mirror, 0 otherwise.
        padding: Width of the border in pixels.

    Returns:
        Images of the same shape and type.
    """
    batch, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + draws[:, 0:1] - padding
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    columns = torch.where(draws[:, 2:3] == 1, width - 1 - columns, columns) + draws[:, 1:2] - padding
    # one gather along flattened pixels: faster on a CPU than indexing with a row and a column tensor
    pixels = rows.clamp(0, height - 1).unsqueeze(2) * width + columns.clamp(0, width - 1).unsqueeze(1)
    index = pixels.flatten(1).unsqueeze(1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view_as(images)
