"""Your own images, in one folder per split and class."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import ImageColor
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from bioprop.datamodules.base import STAGE_SPLITS, ImageDataModule, Resident, Split, trained_images
from bioprop.datamodules.copies import copied, digests, gather_copies
from bioprop.datamodules.image_files import Form, all_grey, decoded, look
from bioprop.datamodules.image_listing import Tally, list_splits, told
from bioprop.datamodules.images import Images, MappedImages
from bioprop.datamodules.kept_images import kept_images
from bioprop.errors import UserError
from bioprop.files import read_checkpoint, readable

logger = logging.getLogger(__name__)


class ImageFolder(ImageDataModule):
    """Your own images: `data_dir/{train,test}/<class>/**`, optionally `data_dir/val/<class>/**`.

    The classes are the folders of `train` in alphabetical order; their sub-folders are read, too. Where there is a
    `val` folder, validation images come from it and `val_fraction` is not used; otherwise they are split off the
    training images, and images that are the same, pixel for pixel, stay on one side. `test` is needed by `test` and
    `predict` alone: it may lack classes, and for `predict` its images need no class folders. Images are all of one
    size, square or not, or resized. What was found and what was passed over (hidden files, files of suffixes that
    Pillow does not read) is said once; docs/image_folders.md has all of it in a table. Images of `val` or `test` that
    are also in `train`, pixel for pixel, are counted in a warning.

    Args:
        data_dir: Folder with the folders of the splits.
        image_size: Resize all images to a square of so many pixels (bilinear, antialiased, without keeping the aspect
            ratio); None for images that are all of one size.
        channels: 1 for grey, 3 for RGB: images are converted; None for grey if all training images are grey by their
            headers, and RGB otherwise.
        background: Colour that transparent images are put over, a name or '#rrggbb': set it where the shapes are as
            white as the default.
        cache: Keep the decoded images in a file in `data_dir/.bioprop-cache` (in the user's cache folder where
            `data_dir` cannot be written to), which later runs and other processes map into memory. With limits it is
            used where it is there, and not made.
        trained_on: Checkpoint that says the classes and the form of images where `data_dir` has no folder `train`: then
            it may be a folder of images to test or predict, or one image, resized to what was trained on. The commands
            that take `--ckpt_path` fill this in.
        shared: Arguments of `ImageDataModule`.

    Raises:
        UserError: An argument is out of range; a folder is missing, empty or may not be read; classes of `val` differ
            from those of `train`; an image is unreadable, of another size, or of more than 8 bits per channel; the
            images do not fit into memory; test images have no label, but are to be tested on.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        background: str = "white",
        cache: bool = True,
        trained_on: str | None = None,
        **shared: Any,
    ) -> None:
        if channels not in (None, 1, 3):
            raise UserError(f"channels is {channels}, but images are grey or RGB: choose 1, 3 or null.")
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size is {image_size}, which is too small: choose 1 or more pixels, or null.")
        try:
            ImageColor.getrgb(background)
        except ValueError as error:
            raise UserError(
                f"background is '{background}', which is no colour: choose a name such as white or '#808080'."
            ) from error
        root, trained = Path(data_dir).expanduser(), None
        if trained_on is not None and not (root / "train").is_dir():
            trained, cache = trained_images(read_checkpoint(trained_on)), False
        classes, splits = list_splits(root, None if trained is None else tuple(trained["classes"]))
        files = next(iter(splits.values())).files
        asked = (channels, image_size, background)  # decides the form of training images, and these that of all others
        kept = kept_images(root, "train", files, asked, None) if cache else None
        if kept is not None:
            shape = (kept.shape[1], kept.shape[2], kept.shape[3])
        elif trained is not None:
            shape = trained["image_shape"] or _shape(files[:1], len(trained["mean"]), image_size)
        else:
            shape = _shape(files, channels, image_size)
        super().__init__(image_shape=shape, classes=classes, **shared)
        gigabytes = min(len(files), self.limits["train"] or len(files)) * math.prod(shape) / 1e9
        if gigabytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9:
            raise UserError(
                f"images of {shape[1]}x{shape[2]} pixels take {gigabytes:,.0f} GB, more than this machine has: "
                "choose a smaller image_size, or fewer images by limit_train."
            )
        if shape[0] == 1 and channels is None and trained is None:
            _inform("all training images are grey, and so are those that the network sees")
        self._root, self._splits, self._cache, self._asked = root, splits, cache, asked
        self._form = Form(shape, image_size is not None or trained is not None, background)
        if trained is not None:
            self._loaded_statistics = trained["mean"], trained["std"]
        self._kept: dict[Split, np.ndarray | None] = {} if kept is None else {"train": kept}

    def setup(self, stage: str) -> None:
        """Decodes the splits that a stage, "fit", "validate", "test" or "predict", needs and that are not in memory.

        Raises:
            UserError: An image cannot be used, or has no label and is to be tested on.
        """
        if stage == "test":
            self._check_labels()
        fresh = "train" not in self.resident
        super().setup(stage)
        if stage == "fit" and fresh:
            counts = (len(self.resident[split].labels) for split in STAGE_SPLITS["fit"])
            _inform("training on %d images, validating on %d", *counts)

    def prediction_names(self) -> list[str]:
        """Returns the test images' paths relative to `data_dir`, in the order of the test and predict loaders."""
        chosen = self._select("test").tolist()
        root = self._root if self._root.is_dir() else self._root.parent
        return [self._splits["test"].files[index].relative_to(root).as_posix() for index in chosen]

    def _has_val_images(self) -> bool:
        return "val" in self._splits

    def _needed(self, stage: str) -> set[Split]:
        needed = super()._needed(stage)
        if "train" not in self._splits:
            return needed - {"train"}
        # which images are on which side of the split depends on both
        return needed if self._has_val_images() or needed == {"test"} else {*needed, "train", "val"}

    def _labels(self, split: Split) -> Tensor:
        if split not in self._splits or not self._splits[split].files:
            lack = "has no images" if split in self._splits else "does not exist"
            raise UserError(f"folder '{self._root / split}' {lack}: the images of this command belong there.")
        return self._splits[split].labels

    def _check_labels(self) -> None:
        unlabelled = (self._labels("test") == self.num_classes).nonzero().flatten().tolist()
        if unlabelled:
            raise UserError(
                f"{len(unlabelled)} test image(s) have no label to test on, since they lie in no folder of a class "
                f"({', '.join(self.classes[:5])}), such as '{self._splits['test'].files[unlabelled[0]]}': sort them "
                "into such folders, remove them, or use predict."
            )

    def _decode(self, split: Split, indices: Tensor) -> Images:
        if self._cache and split not in self._kept:
            self._kept[split] = self._find_or_keep(split)
        if (kept := self._kept.get(split)) is not None:
            return MappedImages(kept, indices)
        images, end = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8), 0
        for block in self._decoded([self._splits[split].files[index] for index in indices.tolist()]):
            images[end : end + len(block)] = torch.from_numpy(block)
            end += len(block)
        return images

    def _find_or_keep(self, split: Split) -> np.ndarray | None:
        """Opens the kept images of a stored split, and keeps them where no limit leaves any of them out."""
        files, form = self._splits[split].files, self._asked if split == "train" else self._form
        used = sum(len(self._select(each)) for each in get_args(Split) if self._source(each) == split)
        decode = None if used < len(files) else partial(self._decoded, files)
        return kept_images(self._root, split, files, form, decode)

    def _decoded(self, files: Sequence[Path]) -> Iterator[np.ndarray]:
        changed: Tally = {}
        yield from decoded(files, self._form, changed)
        if changed:
            _inform("of the images read: %s", told(changed))

    def _check_pixels(self, new: set[Split]) -> None:
        if "val" in new and not self._has_val_images():
            self._keep_copies_together()
        for split in self._splits.keys() - {"train"}:
            if {"train", split} <= self.resident.keys() and {"train", split} & new:
                train = {*digests(self.resident["train"].images)}
                both = [digest in train for digest in digests(self.resident[split].images)]
                if any(both):
                    what = sum(both), len(both), split
                    _warn("%d of the %d images of %s are also in train, pixel for pixel", *what)

    def _keep_copies_together(self) -> None:
        """Moves copies of an image, where the split put some into training and some into validation."""
        train, val = self.resident["train"], self.resident["val"]
        groups = copied(digests(train.images) + digests(val.images))
        if not groups:
            return
        labels, indices = torch.cat((train.labels, val.labels)), torch.cat((train.indices, val.indices))
        first, second, *_ = sorted(self._splits["train"].files[indices[place]] for place in groups[0])
        _warn(
            "%d of the %d training and validation images are copies of others, pixel for pixel ('%s' and '%s'): they "
            "stay on one side of the split",
            *(sum(len(group) - 1 for group in groups), len(labels), readable(first), readable(second)),
        )
        sides = gather_copies(groups, labels, len(train.labels))
        if not len(sides[1]):
            raise UserError(
                f"no image of '{self._root / 'train'}' is left to validate on: all are copies of training images, "
                f"as '{second}' is of '{first}': remove copies, or put images into '{self._root / 'val'}'."
            )
        for label in sorted(set(val.labels.tolist()) - set(labels[sides[1]].tolist())):
            name = readable(self.classes[label])
            _warn("no image of class '%s' is validated on: too many are copies of each other", name)
        if not torch.equal(sides[0], torch.arange(len(train.labels))):
            for split, side in zip(STAGE_SPLITS["fit"], sides, strict=True):
                places = side[: self.limits[split]]
                if isinstance(train.images, Tensor) and isinstance(val.images, Tensor):
                    images: Images = torch.cat((train.images, val.images))[places]
                else:
                    images = self._decode("train", indices[places])
                self.resident[split] = Resident(images, labels[places], indices[places])


def _shape(files: Sequence[Path], channels: int | None, image_size: int | None) -> tuple[int, int, int]:
    """Returns (channels, height, width) as asked for, and else as the first image has them: grey if all images are."""
    native, height, width = look(files[0])
    grey = native == 1 and channels is None and all_grey(files[1:])
    return channels or (1 if grey else 3), image_size or height, image_size or width


_inform, _warn = rank_zero_only(logger.info), rank_zero_only(logger.warning)
