"""The data set that needs no download: scikit-learn's handwritten digits."""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from bioprop.datamodules.base import ImageDataModule, Split
from bioprop.datamodules.sampling import complement, stratified_sample

TEST_FRACTION = 0.2
TEST_SEED = 0


class Digits(ImageDataModule):
    """1,797 real handwritten digits (grey, 8x8 pixels) that come with scikit-learn, enlarged: nothing to download.

    The set has no official split. The test images are a fixed stratified 20% of it (359 images), the same whatever the
    seed; training and validation images are taken from the other 1,438. Images are [1, 16, 16] or [1, 32, 32],
    enlarged bilinearly, their values 0..16 scaled to bytes 0..255.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (test part), UCI Machine Learning
    Repository, 1998, as `sklearn.datasets.load_digits`.

    Args:
        image_size: Height and width of the images in pixels, 16 or 32.
        shared: Arguments of `ImageDataModule`.
    """

    def __init__(self, image_size: Literal[16, 32] = 16, batch_size: int = 64, **shared: Any) -> None:
        shape = (1, image_size, image_size)
        super().__init__(image_shape=shape, classes=tuple("0123456789"), batch_size=batch_size, **shared)
        digits = load_digits()
        self._images = torch.from_numpy(digits.images)
        labels = torch.from_numpy(digits.target)
        test = stratified_sample(labels, round(TEST_FRACTION * len(labels)), np.random.default_rng(TEST_SEED))
        self._places: dict[Split, Tensor] = {"train": complement(len(labels), test), "test": test.sort().values}
        self._targets = labels

    def _labels(self, split: Split) -> Tensor:
        return self._targets[self._places[split]]

    def _decode(self, split: Split, indices: Tensor) -> Tensor:
        images = self._images[self._places[split][indices]].unsqueeze(1)
        enlarged = F.interpolate(images, self.image_shape[1:], mode="bilinear", align_corners=False)
        return (enlarged * (255 / 16)).round().to(torch.uint8)
