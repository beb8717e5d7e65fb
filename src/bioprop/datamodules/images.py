"""Where a loader's images are: in a tensor, or in a file that is mapped into memory and shared between processes."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK = 8192


class Images(Protocol):
    """What loaders need of images: a tensor's own `len` and `index_select`, of the first dimension alone."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def index_select(self, dim: int, index: Tensor, /) -> Tensor:
        """Returns some images, uint8 [len(index), channels, height, width], as a tensor of their own."""
        ...


class MappedImages:
    """Some images of a file, in an order of their own; the file's pages are shared by all processes that map it.

    Nothing is read before it is asked for, and nothing is copied but what is handed out.

    Args:
        stored: uint8 [stored images, channels, height, width], read from the file as its parts are used.
        places: int64 [images]: which of them, in which order.
    """

    def __init__(self, stored: np.ndarray, places: Tensor) -> None:
        self.stored = stored
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def index_select(self, dim: int, index: Tensor, /) -> Tensor:
        """Returns some of these images, uint8 [len(index), channels, height, width], copied out of the file."""
        places = self.places.index_select(0, index).numpy()
        # Read in the order of the file: what is not in the operating system's cache yet comes several times faster. By
        # numpy, because torch has no read-only tensors.
        order = places.argsort()
        images = np.empty((len(places), *self.stored.shape[1:]), dtype=np.uint8)
        images[order] = np.take(self.stored, places[order], axis=0)
        return torch.from_numpy(images)

    def on(self, device: torch.device) -> "DeviceImages":
        """Copies these images, and none else, to a device, a block at a time.

        Raises:
            torch.OutOfMemoryError: The device has too little memory left.
        """
        kept = torch.empty((len(self), *self.stored.shape[1:]), dtype=torch.uint8, device=device)
        for block in torch.split(self.places.argsort(), BLOCK):
            kept.index_copy_(0, block.to(device), self.index_select(0, block).to(device))
        return DeviceImages(kept)


class DeviceImages:
    """Images, uint8 [images, channels, height, width], in an accelerator's memory: batches are put together there."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def index_select(self, dim: int, index: Tensor, /) -> Tensor:
        """Returns some of these images, uint8 [len(index), channels, height, width], on the device."""
        return self.kept.index_select(0, index.to(self.kept.device))


def blocks(images: Images) -> Iterator[Tensor]:
    """Gives all images once, some thousands at a time, in the order in which a disk gives them fastest."""
    order = images.places.argsort() if isinstance(images, MappedImages) else torch.arange(len(images))
    for block in torch.split(order, BLOCK):
        yield images.index_select(0, block)
