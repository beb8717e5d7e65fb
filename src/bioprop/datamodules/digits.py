"""The data set that needs no download: scikit-learn's handwritten digits."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from bioprop.datamodules.base import ImageDataModule, Split
from bioprop.datamodules.normalization import Normalization
from bioprop.datamodules.sampling import complement, stratified_sample
from bioprop.errors import UserError

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
        batch_size: Images in a batch. In training, an epoch's images that do not fill its last batch wait for another
            epoch; evaluation has them all.
        val_fraction: Fraction of the training images set aside for validation, stratified by class.
        normalization: "train" for mean and standard deviation of the training images, "none" for values in [0, 1].
            The published statistics ("cifar10", "imagenet32") are for three channels and refused.
        horizontal_flip: Mirror each training image with probability 1/2 (mirrored digits are no digits).
        crop_padding: Crop each training image at random out of itself padded by this many pixels of its edge.
        seed: Seed of the validation split, the limits, the order of the training images and their augmentation.
        limit_train: Use so many training images, stratified by class; None for all.
        limit_val: Use so many validation images, stratified by class; None for all.
        limit_test: Use so many test images, stratified by class; None for all.

    Raises:
        UserError: An argument is out of range.
    """

    def __init__(
        self,
        image_size: Literal[16, 32] = 16,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        normalization: Normalization = "train",
        horizontal_flip: bool = False,
        crop_padding: int = 0,
        seed: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        if image_size not in (16, 32):
            raise UserError(
                f"image_size is {image_size}, but digits are enlarged to 16 or 32 pixels: choose one of them."
            )
        super().__init__(
            image_shape=(1, image_size, image_size),
            classes=tuple("0123456789"),
            batch_size=batch_size,
            val_fraction=val_fraction,
            normalization=normalization,
            horizontal_flip=horizontal_flip,
            crop_padding=crop_padding,
            seed=seed,
            limit_train=limit_train,
            limit_val=limit_val,
            limit_test=limit_test,
        )
        self.save_hyperparameters()
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
