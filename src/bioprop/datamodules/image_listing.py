"""The images of a folder, by split and class; the files that are passed over, and what is said of that."""

import logging
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from bioprop.datamodules.base import Split
from bioprop.errors import UserError
from bioprop.files import readable

logger = logging.getLogger(__name__)

#: Files by what is to be said of them, a phrase that follows their number.
Tally = dict[str, list[Path]]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
HIDDEN = "hidden"


def told(tally: Tally) -> str:
    """Returns numbers and first names: ``3 hidden ('a/.x'), 1 of suffix .heic ('a/y.heic')``."""
    return ", ".join(f"{len(files)} {kind} ('{readable(files[0])}')" for kind, files in tally.items())


class SplitFiles(NamedTuple):
    """The images of a split and their labels, int64 [images]; those without a label have the number of classes."""

    files: list[Path]
    labels: Tensor


def list_splits(root: Path, trained: tuple[str, ...] | None) -> tuple[tuple[str, ...], dict[Split, SplitFiles]]:
    """Lists the splits of a folder, and says what it has and what is passed over.

    Test images are what there is: some classes may have none, and images that lie in no folder of a class have no
    label. Such images beside class folders are passed over, in `test` as in `train` and `val`. Without `train`, where
    classes are those `trained` on, test images are those of `test`, or else of `root`, which may be one image.

    Returns:
        The classes, which are the folders of `train` in alphabetical order, and the splits that are there.

    Raises:
        UserError: `train` is missing, one of its classes has no images, or `val` has other classes than `train`; a
            folder is a link to nothing.
        OSError: A folder may not be read.
    """
    if not root.is_dir() and not (trained and root.is_file()):
        remedy = "that, or an image" if trained else "one that has the folders train and test"
        raise UserError(f"data_dir '{root}' is not a folder: name {remedy}.")
    found = {split: _Found(root / split) for split in SPLITS if (root / split).is_dir()}
    if trained and "train" not in found:
        classes, found = trained, found or {"test": _Found(root)}
        if not any(each.images or each.loose for each in found.values()):
            raise UserError(f"'{root}' has no images: name a folder that has some, or an image.")
    elif not (classes := tuple(found["train"].images) if "train" in found else ()):
        raise UserError(f"'{root}' has no class folders in a folder train: put images into '{root}/train/<class>/'.")
    for split in found.keys() - {"test"}:
        _check_classes(root, classes, found[split])
    splits = {split: each.labelled(classes, split) for split, each in found.items()}
    counts = "; ".join(f"{split} {_count(each.labels, len(classes))}" for split, each in splits.items())
    _log(logging.INFO, "images in '%s': %s", root, counts)
    for each in found.values():
        if each.passed_over:
            level = logging.INFO if set(each.passed_over) == {HIDDEN} else logging.WARNING
            _log(level, "passed over in '%s': %s", each.folder, told(each.passed_over))
    names = sorted(path.name for path in root.glob("[!.]*") if path.is_dir()) if "train" in found else []
    if beside := [Path(name) for name in names if name not in SPLITS]:
        _log(logging.INFO, "passed over in '%s': %s", root, told({"beside train, val and test": beside}))
    return classes, splits


class _Found:
    """The content of a split's folder: images by class folder, those beside them, and what is passed over.

    Classes and files are in alphabetical order; links are followed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: dict[str, list[Path]] = {}
        self.loose = [folder] if folder.is_file() else []
        self.passed_over: Tally = {}
        for place, folders, names in () if self.loose else os.walk(folder, onerror=_raise, followlinks=True):
            here = Path(place)
            folders[:] = [name for name in sorted(folders) if self._keeps(here / name, is_folder=True)]
            images = [here / name for name in sorted(names) if self._keeps(here / name)]
            if here == folder:
                self.images.update((name, []) for name in folders)
                self.loose += images
                if lost := [path for name in names if not (path := here / name).exists()]:
                    raise UserError(f"'{lost[0]}' is a link to '{os.readlink(lost[0])}', which is not there: mend it.")
            else:
                self.images[here.relative_to(folder).parts[0]] += images
        for files in self.images.values():
            files.sort(key=str)

    def _keeps(self, path: Path, is_folder: bool = False) -> bool:
        """Says if a folder is entered or a file read as an image; counts those that are not."""
        kind, suffix = None, path.suffix.lower()
        if path.name.startswith("."):
            kind = HIDDEN
        elif is_folder and path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
            kind = "linked to a folder above"
        elif not is_folder and suffix not in _readable_suffixes():
            kind = f"of suffix {suffix}, which is not read" if suffix else "without a suffix"
        if kind is not None:
            self.passed_over.setdefault(kind, []).append(path.relative_to(self.folder))
        return kind is None

    def labelled(self, classes: tuple[str, ...], split: Split) -> SplitFiles:
        """Labels the images of class folders; test images that lie elsewhere are kept where they may be meant."""
        images = [self.images.get(name, []) for name in classes]
        others = [file for name, files in self.images.items() if name not in classes for file in files]
        if split == "test" and not any(images):
            others += self.loose
        elif self.loose:
            self.passed_over["beside the class folders"] = [Path(file.name) for file in self.loose]
        counts = torch.tensor([len(files) for files in (*images, others)])
        files = [file for files in (*images, others) for file in files]
        return SplitFiles(files, torch.arange(len(counts)).repeat_interleave(counts))


@cache
def _readable_suffixes() -> frozenset[str]:
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def _raise(error: OSError) -> NoReturn:
    raise error


def _check_classes(root: Path, classes: tuple[str, ...], found: _Found) -> None:
    """Makes sure that training or validation images are of the classes, and of all of them."""
    for name in sorted({*classes, *found.images}):
        if name not in classes:
            raise UserError(
                f"class '{name}' of '{found.folder}' is unknown, because '{root / 'train'}' has no such folder: remove "
                f"it or add '{root / 'train' / name}'."
            )
        if not found.images.get(name):
            val = found.folder.name == "val"
            remedy = f"'{found.folder}', to split them off the training images" if val else "the folder"
            passed_over = f" (passed over: {told(found.passed_over)})" if found.passed_over else ""
            raise UserError(
                f"class folder '{found.folder / name}' has no images: put some there (.png, .jpg and other formats "
                f"that Pillow reads) or remove {remedy}{passed_over}."
            )


def _count(labels: Tensor, num_classes: int) -> str:
    labelled = labels[labels < num_classes]
    parts = [f"{len(labelled)} of {len(set(labelled.tolist()))} classes"] if len(labelled) else []
    if unlabelled := len(labels) - len(labelled):
        parts.append(f"{unlabelled} without a label")
    return " and ".join(parts) or "none"


_log = rank_zero_only(logger.log)
