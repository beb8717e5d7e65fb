"""Images a second: our resident loader against torchvision's transforms of one image at a time."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.measuring import interleaved
from bioprop.datamodules.base import ImageDataModule, Split
from bioprop.datamodules.normalization import PUBLISHED

BATCH, PADDING, CLASSES = 128, 4, 10
OURS, TORCHVISION = "resident loader", "torchvision, one process"


class NoiseImages(ImageDataModule):
    """Noise of 3x32x32 bytes, treated as CIFAR-10 is."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(
            image_shape=(3, 32, 32),
            classes=tuple(map(str, range(CLASSES))),
            batch_size=BATCH,
            val_fraction=0.1,
            normalization="cifar10",
            horizontal_flip=True,
            crop_padding=PADDING,
            seed=0,
            limit_train=None,
            limit_val=None,
            limit_test=None,
        )
        self.images = images

    def _labels(self, split: Split) -> Tensor:
        return torch.arange(len(self.images)) % CLASSES

    def _decode(self, split: Split, indices: Tensor) -> Tensor:
        return self.images[indices]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the batches of an epoch as an algorithm gets them."""
        for batch in self.train_dataloader():
            yield self.on_after_batch_transfer(batch, 0)


class PillowImages(Dataset[tuple[Tensor, int]]):
    """The same images, as torchvision's data sets hand them out: decoded and transformed one by one."""

    def __init__(self, images: Tensor) -> None:
        self.pixels: np.ndarray = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=PADDING, padding_mode="edge"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(*PUBLISHED["cifar10"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), index % CLASSES


def loading_rates(images: int, rounds: int) -> dict[str, tuple[list[float], float]]:
    """Time whole epochs of training batches.

    Args:
        images: number of images in memory; nine tenths are for training.
        rounds: timed epochs.

    Returns:
        Seconds an epoch and the median rate in images a second, by name of the loader.
    """
    pixels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8)
    ours = NoiseImages(pixels)
    ours.setup("fit")
    kept = ours.resident["train"].images
    torchvision = DataLoader(PillowImages(kept), batch_size=BATCH, shuffle=True, drop_last=True)
    sources: dict[str, Callable[[], object]] = {
        OURS: lambda: _drain(ours.batches()),
        TORCHVISION: lambda: _drain(torchvision),
    }
    handed_out = len(kept) // BATCH * BATCH
    seconds = interleaved(sources, rounds)
    return {name: (times, handed_out / float(np.median(times))) for name, times in seconds.items()}


def _drain(batches: object) -> None:
    for _ in batches:  # type: ignore[attr-defined]
        pass
