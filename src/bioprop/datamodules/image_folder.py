"""Your own images, in one folder per split and class."""

import logging
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bioprop.datamodules.base import ImageDataModule, Split
from bioprop.datamodules.image_files import decode, digests, list_class_folders, look
from bioprop.datamodules.normalization import Normalization
from bioprop.errors import UserError

logger = logging.getLogger(__name__)

OPTIONAL_SPLITS: tuple[Split, ...] = ("val", "test")


class ImageFolder(ImageDataModule):
    """Your own images: `data_dir/{train,test}/<class>/*`, optionally `data_dir/val/<class>/*`.

    The classes are the folders of `train` in alphabetical order. Where there is a `val` folder, validation images come
    from it and `val_fraction` is not used; otherwise they are split off the training images. `test` is needed by `test`
    and `predict` alone. Images are all of one size, square or not, or resized. Hidden files and files not named like
    images are passed over. Images of `val` that are also in `train`, pixel for pixel, are refused; images of `test`
    that are also in `train` are counted in a warning.

    Args:
        data_dir: Folder with the folders of the splits.
        image_size: Resize all images to a square of so many pixels (bilinear, antialiased, without keeping the aspect
            ratio); None for images that are all of one size.
        channels: 1 for grey, 3 for RGB: images are converted; None for what the first training image is.
        batch_size: Images in a batch. In training, an epoch's images that do not fill its last batch wait for another
            epoch; evaluation has them all.
        val_fraction: Fraction of the training images set aside for validation, stratified by class.
        normalization: "train" for mean and standard deviation of each channel of the training images, "cifar10" or
            "imagenet32" for the published ones (3 channels), "none" for values in [0, 1].
        horizontal_flip: Mirror each training image with probability 1/2.
        crop_padding: Crop each training image at random out of itself padded by this many pixels of its edge.
        seed: Seed of the validation split, the limits, the order of the training images and their augmentation.
        limit_train: Use so many training images, stratified by class; None for all. The others are not decoded.
        limit_val: Use so many validation images, stratified by class; None for all.
        limit_test: Use so many test images, stratified by class; None for all.

    Raises:
        UserError: An argument is out of range, a folder is missing or empty, classes differ between splits, or an
            image is unreadable, of another size, or both in `val` and `train`.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        normalization: Normalization = "train",
        horizontal_flip: bool = False,
        crop_padding: int = 0,
        seed: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        if channels not in (None, 1, 3):
            raise UserError(f"channels is {channels}, but images are grey or RGB: choose 1, 3 or null.")
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size is {image_size}, which is too small: choose 1 or more pixels, or null.")
        root = Path(data_dir).expanduser()
        if not root.is_dir():
            raise UserError(f"data_dir '{data_dir}' is not a folder: name one that has the folders train and test.")
        listed: dict[Split, dict[str, list[Path]]] = {"train": list_class_folders(root / "train")}
        for split in OPTIONAL_SPLITS:
            if (root / split).is_dir():
                listed[split] = list_class_folders(root / split)
                _check_classes(root, split, set(listed["train"]), set(listed[split]))
        classes = tuple(listed["train"])
        native_channels, height, width = look(listed["train"][classes[0]][0])
        super().__init__(
            image_shape=(channels or native_channels, image_size or height, image_size or width),
            classes=classes,
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
        self._root = root
        self._resize = image_size is not None
        self._files = {
            split: [file for files in folders.values() for file in files] for split, folders in listed.items()
        }
        self._targets = {
            split: torch.arange(len(classes)).repeat_interleave(
                torch.tensor([len(files) for files in folders.values()])
            )
            for split, folders in listed.items()
        }

    def prediction_names(self) -> list[str]:
        """Returns the test images' paths relative to `data_dir`, in the order of the test and predict loaders."""
        chosen = self._select("test").tolist()
        return [self._files["test"][index].relative_to(self._root).as_posix() for index in chosen]

    def _has_val_images(self) -> bool:
        return "val" in self._files

    def _labels(self, split: Split) -> Tensor:
        if split not in self._targets:
            raise UserError(f"folder '{self._root / split}' does not exist: it is where the images to test on belong.")
        return self._targets[split]

    def _decode(self, split: Split, indices: Tensor) -> Tensor:
        return decode([self._files[split][index] for index in indices.tolist()], self.image_shape, self._resize)

    def _check_pixels(self, new: set[Split]) -> None:
        for split in OPTIONAL_SPLITS:
            pair: set[Split] = {"train", split}
            if split in self._files and pair <= self.resident.keys() and pair & new:
                self._check_overlap(split)

    def _check_overlap(self, split: Split) -> None:
        """Refuses validation images that are training images too, and warns of such test images."""
        train = dict(zip(digests(self.resident["train"].images), self.resident["train"].indices.tolist(), strict=True))
        images, _, indices = self.resident[split]
        same = [
            (index, train[digest])
            for digest, index in zip(digests(images), indices.tolist(), strict=True)
            if digest in train
        ]
        if same and split == "val":
            index, train_index = same[0]
            raise UserError(
                f"'{self._files['val'][index]}' is the same image as '{self._files['train'][train_index]}', but "
                "validation needs images that are not trained on: remove one of them."
            )
        if same:
            logger.warning(
                "%d of the %d test images are also training images, pixel for pixel.", len(same), len(images)
            )


def _check_classes(root: Path, split: Split, expected: set[str], found: set[str]) -> None:
    for name in sorted(expected - found):
        raise UserError(
            f"class '{name}' of '{root / 'train'}' is missing from '{root / split}': add '{root / split / name}'."
        )
    for name in sorted(found - expected):
        raise UserError(
            f"class '{name}' of '{root / split}' is unknown, because '{root / 'train'}' has no such folder: remove it "
            f"or add '{root / 'train' / name}'."
        )
