"""Your own images, in one folder per split and class."""

import logging
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from bioprop.datamodules.base import STAGE_SPLITS, ImageDataModule, Split
from bioprop.datamodules.copies import copied, digests, gather_copies, take
from bioprop.datamodules.image_cache import Kept, find_kept, keep
from bioprop.datamodules.image_files import COLOURED, Form, all_grey, check_background, check_memory, decode, look
from bioprop.datamodules.image_listing import OPTIONAL_SPLITS, Tally, list_splits, unknown_class
from bioprop.datamodules.images import Images, MappedImages
from bioprop.errors import UserError
from bioprop.files import readable

logger = logging.getLogger(__name__)


class ImageFolder(ImageDataModule):
    """Your own images: `data_dir/{train,test}/<class>/**`, optionally `data_dir/val/<class>/**`.

    The classes are the folders of `train` in alphabetical order; their sub-folders are read, too. Where there is a
    `val` folder, validation images come from it and `val_fraction` is not used; otherwise they are split off the
    training images, and images that are the same, pixel for pixel, stay on one side. `test` is needed by `test` and
    `predict` alone: it may lack classes, and for `predict` its images need no class folders. Images are all of one
    size, square or not, or resized. What was found and what was passed over (hidden files, links to nothing, files of
    suffixes that Pillow does not read) is said once; docs/image_folders.md has all of it in a table. Images of `val`
    that are also in `train`, pixel for pixel, are refused; images of `test` that are also in `train` are counted in a
    warning.

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
        shared: Arguments of `ImageDataModule`.

    Raises:
        UserError: An argument is out of range; a folder is missing, empty or may not be read; classes of `val` differ
            from those of `train`; an image is unreadable, of another size, of more than 8 bits per channel, or both
            in `val` and `train`; the images do not fit into memory; test images have no label, but are to be tested on.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        background: str = "white",
        cache: bool = True,
        **shared: Any,
    ) -> None:
        if channels not in (None, 1, 3):
            raise UserError(f"channels is {channels}, but images are grey or RGB: choose 1, 3 or null.")
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size is {image_size}, which is too small: choose 1 or more pixels, or null.")
        check_background(background)
        root = Path(data_dir).expanduser()
        if not root.is_dir():
            raise UserError(f"data_dir '{data_dir}' is not a folder: name one that has the folders train and test.")
        classes, splits = list_splits(root)
        first, *others = splits["train"].files
        native_channels, height, width = look(first)
        size = image_size or height, image_size or width
        grey = native_channels == 1 and channels is None
        if grey:  # which kept images tell without a file being read
            form = Form((1, *size), image_size is not None, background)
            kept = find_kept(root, "train", splits["train"].files, form) if cache else None
            grey = all_grey(others) if kept is None else COLOURED not in chain(*kept.notes.values())
        super().__init__(image_shape=(channels or (1 if grey else 3), *size), classes=classes, **shared)
        check_memory(min(len(others) + 1, self.limits["train"] or len(others) + 1), self.image_shape)
        if grey:
            _inform("all training images are grey, and so are those that the network sees")
        self._root = root
        self._splits = splits
        self._form = Form(self.image_shape, image_size is not None, background)
        self._cache = cache
        self._kept: dict[Split, Kept | None] = {}
        self._changed = Tally()

    def setup(self, stage: str) -> None:
        """Decodes the splits that a stage needs and that are not in memory yet.

        Args:
            stage: "fit", "validate", "test" or "predict".

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
        if self._changed:
            _inform("of the images read: %s", self._changed)
            self._changed = Tally()

    def prediction_names(self) -> list[str]:
        """Returns the test images' paths relative to `data_dir`, in the order of the test and predict loaders."""
        chosen = self._select("test").tolist()
        return [self._splits["test"].files[index].relative_to(self._root).as_posix() for index in chosen]

    def _has_val_images(self) -> bool:
        return "val" in self._splits

    def _needed(self, stage: str) -> set[Split]:
        needed = super()._needed(stage)
        # which images are on which side of the split depends on both
        return needed if self._has_val_images() or needed == {"test"} else {*needed, "train", "val"}

    def _labels(self, split: Split) -> Tensor:
        if split not in self._splits:
            raise UserError(f"folder '{self._root / split}' does not exist: it is where the images to test on belong.")
        if not self._splits[split].files:
            raise UserError(f"folder '{self._root / split}' has no images: it is where those to test on belong.")
        return self._splits[split].labels

    def _check_labels(self) -> None:
        labels = self._labels("test")
        unlabelled = (labels == self.num_classes).nonzero().flatten().tolist()
        if unlabelled:
            name, *below = self._splits["test"].files[unlabelled[0]].relative_to(self._root / "test").parts
            if below and len(unlabelled) < len(labels):
                raise UserError(unknown_class(self._root, "test", name))
            raise UserError(
                f"the images in '{self._root / 'test'}' have no labels to test on, since none lies in a folder of a "
                f"class ({', '.join(self.classes[:5])}): sort them into such folders, or use predict."
            )

    def _decode(self, split: Split, indices: Tensor) -> Images:
        files = self._splits[split].files
        if self._cache and split not in self._kept:
            self._kept[split] = self._find_or_keep(split)
        if (kept := self._kept.get(split)) is None:
            return decode([files[index] for index in indices.tolist()], self._form, self._changed)
        for index in indices.tolist():
            for kind in kept.notes.get(index, ()):
                self._changed.add(kind, files[index])
        return MappedImages(kept.images, indices)

    def _find_or_keep(self, split: Split) -> Kept | None:
        """Opens the kept images of a stored split, and keeps them where no limit leaves any of them out."""
        files = self._splits[split].files
        used = sum(len(self._select(each)) for each in get_args(Split) if self._source(each) == split)
        return (keep if used == len(files) else find_kept)(self._root, split, files, self._form)

    def _check_pixels(self, new: set[Split]) -> None:
        if "val" in new and not self._has_val_images():
            self._keep_copies_together()
        for split in OPTIONAL_SPLITS:
            pair: set[Split] = {"train", split}
            if split in self._splits and pair <= self.resident.keys() and pair & new:
                self._check_overlap(split)

    def _keep_copies_together(self) -> None:
        """Moves copies of an image, where the split put some into training and some into validation."""
        train, val = self.resident["train"], self.resident["val"]
        groups = copied([digest for split in (train, val) for digest in digests(split.images)])
        if not groups:
            return
        labels, indices = torch.cat((train.labels, val.labels)), torch.cat((train.indices, val.indices))
        first, second, *_ = sorted(self._splits["train"].files[indices[place]] for place in groups[0])
        _warn(
            "%d of the %d training and validation images are copies of others, pixel for pixel ('%s' and '%s'): they "
            "stay on one side of the split",
            sum(len(group) - 1 for group in groups),
            len(labels),
            readable(first),
            readable(second),
        )
        sides = gather_copies(groups, labels, len(train.labels))
        if not len(sides.val):
            raise UserError(
                f"no image of '{self._root / 'train'}' is left to validate on: all are copies of training images, "
                f"as '{second}' is of '{first}': remove copies, or put images into '{self._root / 'val'}'."
            )
        for label in sorted(set(val.labels.tolist()) - set(labels[sides.val].tolist())):
            _warn(
                "no image of class '%s' is validated on: too many are copies of each other",
                readable(self.classes[label]),
            )
        if torch.equal(sides.train, torch.arange(len(train.labels))):
            return  # nothing straddled the split
        self.resident["train"] = take(sides.train[: self.limits["train"]], train, val)
        self.resident["val"] = take(sides.val[: self.limits["val"]], train, val)

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
                f"'{self._splits['val'].files[index]}' is the same image as "
                f"'{self._splits['train'].files[train_index]}', but validation needs images that are not trained on: "
                "remove one of them."
            )
        if same:
            _warn("%d of the %d test images are also training images, pixel for pixel.", len(same), len(indices))


_inform, _warn = rank_zero_only(logger.info), rank_zero_only(logger.warning)
