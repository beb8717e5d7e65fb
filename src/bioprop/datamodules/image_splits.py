"""What a folder of images has to offer: its splits, classes and labels, and the words for that."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from bioprop.datamodules.base import Split
from bioprop.datamodules.image_listing import BROKEN_LINK, HIDDEN, Found, list_split, may_hold_images
from bioprop.datamodules.tally import Tally
from bioprop.errors import UserError
from bioprop.files import readable

logger = logging.getLogger(__name__)

OPTIONAL_SPLITS: tuple[Split, ...] = ("val", "test")
EXAMPLES = ".png, .jpg and other formats that Pillow reads"


class SplitFiles(NamedTuple):
    """The images of a split and their labels, int64 [images]; those without a label have the number of classes."""

    files: list[Path]
    labels: Tensor


def list_splits(root: Path) -> tuple[tuple[str, ...], dict[Split, SplitFiles]]:
    """Lists the splits of a folder, and says what it has and what is passed over.

    Test images are what there is: some classes may have none, and images that lie in no folder of a class have no
    label. Such images beside class folders are passed over, in `test` as in `train` and `val`.

    Returns:
        The classes, which are the folders of `train` in alphabetical order, and the splits that are there.

    Raises:
        UserError: `train` is missing, one of its classes has no images, or `val` has other classes than `train`.
    """
    found: dict[Split, Found] = {"train": list_split(root / "train")}
    _check_classes(root / "train", found["train"])
    classes = tuple(found["train"].images)
    for split in OPTIONAL_SPLITS:
        if (root / split).is_dir():
            found[split] = list_split(root / split)
    if "val" in found:
        _check_validation_classes(root, set(classes), found["val"])
    splits = {split: _label(each, classes, split == "test") for split, each in found.items()}
    _say(root, classes, splits, {split: each.passed_over for split, each in found.items()})
    return classes, splits


def _label(found: Found, classes: Sequence[str], all_of_them: bool) -> SplitFiles:
    """Labels the images of class folders; of a test set, `all_of_them`, the others are kept where they may be meant."""
    images = [found.images.get(name, []) for name in classes]
    others = [file for name, files in found.images.items() if name not in classes for file in files]
    if all_of_them:
        for name in found.broken:
            found.passed_over.add(BROKEN_LINK, name)
        for name, files in found.images.items():
            if not files:
                found.passed_over.add("without images", name)
    if all_of_them and not any(images):
        others += found.loose
    elif found.loose:
        found.passed_over.add("beside the class folders", found.loose[0].name, len(found.loose))
    counts = torch.tensor([len(files) for files in (*images, others)])
    return SplitFiles(
        [file for files in (*images, others) for file in files],
        torch.arange(len(counts)).repeat_interleave(counts),
    )


@rank_zero_only
def _say(
    root: Path, classes: Sequence[str], splits: Mapping[Split, SplitFiles], passed_over: Mapping[Split, Tally]
) -> None:
    counts = "; ".join(f"{split} {_count(each.labels, classes)}" for split, each in splits.items())
    logger.info("images in '%s': %s", root, readable(counts))
    for split, tally in passed_over.items():
        if tally:
            level = logging.INFO if tally.kinds() == {HIDDEN} else logging.WARNING
            logger.log(level, "passed over in '%s': %s", root / split, tally)
    beside = Tally()
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name not in ("train", *OPTIONAL_SPLITS) and may_hold_images(entry):
            beside.add("beside train, val and test", entry.name)
    if beside:
        logger.info("passed over in '%s': %s", root, beside)


def _count(labels: Tensor, classes: Sequence[str]) -> str:
    counts = torch.bincount(labels, minlength=len(classes) + 1).tolist()
    unlabelled = counts.pop()
    parts = [f"{unlabelled} without a label"] if unlabelled else []
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    if len(missing) < len(classes):
        named = ", ".join(f"'{name}'" for name in missing[:5])
        lacking = f" (none of {named}{' and others' if len(missing) > 5 else ''})" if missing else ""
        parts.insert(0, f"{sum(counts)} of {len(classes) - len(missing)} classes{lacking}")
    return " and ".join(parts) or "none"


def _check_classes(root: Path, found: Found) -> None:
    """Makes sure that every class has images, and that there are classes at all.

    Raises:
        UserError: There are no class folders, one has no images, or a link that may be one leads nowhere.
    """
    _refuse_broken(root, found)
    if not found.images:
        raise UserError(f"folder '{root}' has no class folders: images are expected in '{root}/<class>/'.")
    for name, images in found.images.items():
        if not images:
            passed_over = f" (passed over: {found.passed_over})" if found.passed_over else ""
            raise UserError(
                f"class folder '{root / name}' has no images: put some there ({EXAMPLES}) or remove the folder"
                f"{passed_over}."
            )


def _refuse_broken(root: Path, found: Found) -> None:
    for name in found.broken:
        raise UserError(
            f"'{root / name}' is a link to '{os.readlink(root / name)}', which does not exist: mend or remove it, "
            "since it may be a class."
        )


def _check_validation_classes(root: Path, classes: set[str], found: Found) -> None:
    """Makes sure that validation images are of the classes of training, and of all of them.

    Raises:
        UserError: A class has no images, or is unknown.
    """
    val = root / "val"
    _refuse_broken(val, found)
    for name in sorted(classes):
        if not found.images.get(name):
            raise UserError(
                f"class '{name}' of '{root / 'train'}' is missing from '{val}': put images into '{val / name}', or "
                f"remove '{val}', and validation images are split off the training images."
            )
    _check_classes(val, found)
    for name in sorted(found.images.keys() - classes):
        raise UserError(unknown_class(root, "val", name))


def unknown_class(root: Path, split: str, name: str) -> str:
    """Returns the sentence on a class that training images do not have."""
    return (
        f"class '{name}' of '{root / split}' is unknown, because '{root / 'train'}' has no such folder: remove it or "
        f"add '{root / 'train' / name}'."
    )
