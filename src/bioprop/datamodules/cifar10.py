"""CIFAR-10, downloaded by torchvision."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

from bioprop.datamodules.base import ImageDataModule, Split
from bioprop.datamodules.normalization import Normalization
from bioprop.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CIFAR10(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test photographs of ten kinds of things, [3, 32, 32].

    The defaults are the published recipe: mirrored with probability 1/2, cropped at random out of the image padded by 4
    pixels of its edge, normalised with the published statistics.

    Source: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html, read by `torchvision.datasets.CIFAR10`, which checks the files' MD5
    sums.

    Args:
        data_dir: Folder that holds `cifar-10-batches-py/`, or into which it is downloaded (170 MB).
        download: Download the files if they are not there.
        batch_size: Images in a batch. In training, an epoch's images that do not fill its last batch wait for another
            epoch; evaluation has them all.
        val_fraction: Fraction of the training images set aside for validation, stratified by class.
        normalization: "cifar10" for the published mean (0.4914, 0.4822, 0.4465) and standard deviation (0.2470, 0.2435,
            0.2616), "imagenet32" for those of ImageNet, "train" for those of the training images, "none" for [0, 1].
        horizontal_flip: Mirror each training image with probability 1/2.
        crop_padding: Crop each training image at random out of itself padded by this many pixels of its edge.
        seed: Seed of the validation split, the limits, the order of the training images and their augmentation.
        limit_train: Use so many training images, stratified by class; None for all.
        limit_val: Use so many validation images, stratified by class; None for all.
        limit_test: Use so many test images, stratified by class; None for all.

    Raises:
        UserError: An argument is out of range; the files are missing or damaged and are not, or cannot be, downloaded.
    """

    def __init__(
        self,
        data_dir: str = "data",
        download: bool = True,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        normalization: Normalization = "cifar10",
        horizontal_flip: bool = True,
        crop_padding: int = 4,
        seed: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        super().__init__(
            image_shape=(3, 32, 32),
            classes=CLASSES,
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
        data_dir = str(data_dir)  # a Path would make the checkpoint unreadable under weights_only=True
        self.save_hyperparameters()
        self.data_dir = Path(data_dir).expanduser()
        self.download = download
        self._stored: dict[Split, datasets.CIFAR10] = {}

    def prepare_data(self) -> None:
        """Downloads the files if asked to; Lightning calls this once a machine, before `setup`."""
        if self.download:
            self._open("train", download=True)

    def setup(self, stage: str) -> None:
        """Reads the splits that a stage needs and that are not in memory yet.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        super().setup(stage)
        self._stored.clear()  # what is used of them is resident by now

    def _labels(self, split: Split) -> Tensor:
        return torch.tensor(self._load(split).targets)

    def _decode(self, split: Split, indices: Tensor) -> Tensor:
        images = torch.from_numpy(self._load(split).data)  # uint8 [images, height, width, channels]
        return images[indices].permute(0, 3, 1, 2).contiguous()

    def _load(self, split: Split) -> datasets.CIFAR10:
        if split not in self._stored:
            self._stored[split] = self._open(split, download=False)
        return self._stored[split]

    def _open(self, split: Split, download: bool) -> datasets.CIFAR10:
        try:
            return datasets.CIFAR10(self.data_dir, train=split == "train", download=download)
        # URLError and its like are OSErrors, torchvision's word for missing or damaged files is RuntimeError
        except (OSError, RuntimeError) as error:
            place = self.data_dir / datasets.CIFAR10.base_folder
            if download:
                raise UserError(
                    f"CIFAR-10 is not in '{place}' and could not be downloaded there ({error}): connect to the network "
                    f"or unpack {datasets.CIFAR10.url} into '{self.data_dir}'."
                ) from error
            raise UserError(
                f"the files of CIFAR-10 are missing from '{place}', or damaged: set download to true or unpack "
                f"{datasets.CIFAR10.url} into '{self.data_dir}'."
            ) from error
