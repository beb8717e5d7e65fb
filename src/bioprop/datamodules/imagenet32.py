"""ImageNet of 32x32 pixels, from the files that its authors publish."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bioprop.datamodules.base import VAL_STREAM, ImageDataModule, Split
from bioprop.datamodules.imagenet32_files import IMAGE_SHAPE, Converted, StoredSet, open_converted
from bioprop.datamodules.images import Images, MappedImages
from bioprop.datamodules.normalization import Normalization
from bioprop.datamodules.sampling import equal_sample
from bioprop.errors import UserError

#: The published set of each split that is stored: the official validation images are what a run is tested on.
STORED: dict[Split, StoredSet] = {"train": "train", "test": "val"}


def class_names() -> tuple[str, ...]:
    """Returns the thousand classes in the order of the labels, which is that of the ILSVRC2012 development kit."""
    lines = (files("bioprop.datamodules") / "imagenet32_classes.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.split()[1] for line in lines)


class ImageNet32(ImageDataModule):
    """ImageNet (ILSVRC2012) of 32x32 pixels: 1,281,167 training and 50,000 test images of 1,000 classes, [3, 32, 32].

    The files are yours to download, because that needs a login: at image-net.org, under Download, Downsampled image
    data, either as npz (`Imagenet32_train_npz.zip`, `Imagenet32_val_npz.zip`) or as pickles (`Imagenet32_train.zip`,
    `Imagenet32_val.zip`). Put them into `data_dir`, as they are or unpacked. At first use each set is converted to one
    file (3.94 GB for training), which all processes map into memory together. The downloaded files can go then.

    The test images are the official validation images; validation images are taken out of the training images. Labels
    are 0..999 in the order of the ILSVRC2012 development kit (kit fox, English setter, ...), not in the alphabetical
    one of torchvision's models. The defaults are the published recipe (Ernoult et al., ICML 2022).

    Source: P. Chrabaszcz, I. Loshchilov and F. Hutter, A downsampled variant of ImageNet as an alternative to the CIFAR
    datasets, 2017.

    Args:
        data_dir: Folder of the downloaded files.
        converted_dir: Folder for the converted files, if not `data_dir`.
        verify: Before the first use, compare the files with the published ones: size and sha256 checksum of the npz
            archives (none are published of the others), the number of images in each file of all.
        num_val_per_class: Training images of each class set aside for validation.
        normalization: "imagenet32" for the published mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224,
            0.225); the others as in `ImageDataModule`.
        shared: Arguments of `ImageDataModule`.

    Raises:
        UserError: An argument is out of range; the files are missing, damaged or others; there is no room for the
            converted ones.
    """

    def __init__(
        self,
        data_dir: str = "data",
        *,
        converted_dir: str | None = None,
        verify: bool = True,
        batch_size: int = 256,
        num_val_per_class: int = 50,
        normalization: Normalization = "imagenet32",
        horizontal_flip: bool = True,
        crop_padding: int = 4,
        **shared: Any,
    ) -> None:
        if num_val_per_class < 1:
            raise UserError(f"num_val_per_class is {num_val_per_class}, which is too small: choose 1 or more.")
        super().__init__(
            image_shape=IMAGE_SHAPE,
            classes=class_names(),
            batch_size=batch_size,
            val_fraction=None,  # type: ignore[arg-type]  # see _held_out
            normalization=normalization,
            horizontal_flip=horizontal_flip,
            crop_padding=crop_padding,
            **shared,
        )
        self.data_dir = Path(data_dir).expanduser()
        self.converted_dir = self.data_dir if converted_dir is None else Path(converted_dir).expanduser()
        self.verify = verify
        self.num_val_per_class = num_val_per_class
        self._converted: dict[Split, Converted] = {}

    def _open(self, split: Split) -> Converted:
        if split not in self._converted:
            self._converted[split] = open_converted(self.data_dir, self.converted_dir, STORED[split], self.verify)
        return self._converted[split]

    def _labels(self, split: Split) -> Tensor:
        return torch.from_numpy(self._open(split)[1])

    def _decode(self, split: Split, indices: Tensor) -> Images:
        return MappedImages(self._open(split)[0], indices)

    def _held_out(self, labels: Tensor) -> Tensor:
        """The training images to validate on: the same number of each class, never all of one."""
        counts = torch.bincount(labels, minlength=self.num_classes)
        smallest = int(counts.argmin())
        if counts[smallest] <= self.num_val_per_class:
            raise UserError(
                f"num_val_per_class is {self.num_val_per_class}, but class '{self.classes[smallest]}' has "
                f"{int(counts[smallest])} training images: choose a smaller number, so that some are left to train on."
            )
        return equal_sample(labels, self.num_val_per_class, self._rng(VAL_STREAM))
