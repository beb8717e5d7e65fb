"""The images of a folder, by split and class; the files that are passed over, and why; the words for that."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, features
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from bioprop.datamodules.base import Split
from bioprop.errors import UserError
from bioprop.files import readable

logger = logging.getLogger(__name__)

OPTIONAL_SPLITS: tuple[Split, ...] = ("val", "test")
#: Formats that Pillow names but does not decode itself: films, containers of numbers, programs for other interpreters.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
HIDDEN = "hidden"
BROKEN_LINK = "linked to nothing"


class Tally(dict[str, list[str | Path]]):
    """Names of files by what was found of them; as text, numbers and first names: ``3 hidden ('a/.x')``."""

    def add(self, kind: str, *names: str | Path) -> None:
        """Adds files; `kind` follows a number in the sentence."""
        self.setdefault(kind, []).extend(names)

    def __str__(self) -> str:
        return ", ".join(f"{len(names)} {kind} ('{readable(names[0])}')" for kind, names in self.items())


class SplitFiles(NamedTuple):
    """The images of a split and their labels, int64 [images]; those without a label have the number of classes."""

    files: list[Path]
    labels: Tensor


class _Found(NamedTuple):
    """The content of a split's folder: images by class folder, those beside them, broken links, and all else."""

    images: dict[str, list[Path]]
    loose: list[Path]
    broken: list[str]  # these may have been class folders
    passed_over: Tally


def list_splits(root: Path) -> tuple[tuple[str, ...], dict[Split, SplitFiles]]:
    """Lists the splits of a folder, and says what it has and what is passed over.

    Test images are what there is: some classes may have none, and images that lie in no folder of a class have no
    label. Such images beside class folders are passed over, in `test` as in `train` and `val`.

    Returns:
        The classes, which are the folders of `train` in alphabetical order, and the splits that are there.

    Raises:
        UserError: `train` is missing, one of its classes has no images, or `val` has other classes than `train`; a
            folder may not be read.
    """
    found: dict[Split, _Found] = {"train": _list_split(root / "train")}
    _check_classes(root / "train", found["train"])
    classes = tuple(found["train"].images)
    for split in OPTIONAL_SPLITS:
        if (root / split).is_dir():
            found[split] = _list_split(root / split)
    if "val" in found:
        _check_validation_classes(root, set(classes), found["val"])
    splits = {split: _label(each, classes, split == "test") for split, each in found.items()}
    _say(root, classes, splits, {split: each.passed_over for split, each in found.items()})
    return classes, splits


@cache
def readable_suffixes() -> frozenset[str]:
    """Returns the suffixes, in lower case, of the image formats that the installed Pillow decodes."""
    missing = NO_PICTURES if features.check("jpg_2000") else {*NO_PICTURES, "JPEG2000"}
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in missing)


def _list_split(folder: Path) -> _Found:
    """Lists the images of one split, `folder/<class>/**`, classes and files in alphabetical order."""
    if not folder.is_dir():
        raise UserError(f"folder '{folder}' does not exist: images are expected in '{folder}/<class>/'.")
    found = _Found({}, [], [], Tally())
    for entry in _entries(folder):
        reason = _why_not(entry)
        if reason is None and _leads_to(entry.is_dir):
            found.images[entry.name] = _walk(folder, Path(entry.path), found.passed_over)
        elif reason is None:
            found.loose.append(Path(entry.path))
        elif reason == BROKEN_LINK and _suffix(entry) not in readable_suffixes():
            found.broken.append(entry.name)
        else:
            found.passed_over.add(reason, entry.name)
    return found


def _walk(root: Path, folder: Path, passed_over: Tally) -> list[Path]:
    """Returns the images of a folder and its sub-folders, by their paths in alphabetical order."""
    images: list[str] = []
    waiting: list[tuple[str, tuple[str, ...]]] = [(str(folder), (os.path.realpath(root), os.path.realpath(folder)))]
    while waiting:
        place, above = waiting.pop()
        for entry in _entries(Path(place)):
            reason = _why_not(entry)
            if reason is None and not _leads_to(entry.is_dir):
                images.append(entry.path)
                continue
            target = os.path.realpath(entry.path)
            if reason is None and target in above:
                reason = "linked to a folder above"
            if reason is None:
                waiting.append((entry.path, (*above, target)))
            else:
                passed_over.add(reason, Path(entry.path).relative_to(root))
    return [Path(path) for path in sorted(images)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"folder '{folder}' cannot be read ({error.strerror}): permit it, or move it away.") from error


def _why_not(entry: os.DirEntry[str]) -> str | None:
    """Returns why an entry of a folder is passed over; None for a folder and for a file named like an image."""
    if entry.name.startswith("."):
        return HIDDEN
    if _leads_to(entry.is_dir):
        return None
    if not _leads_to(entry.is_file):
        return BROKEN_LINK if entry.is_symlink() else "neither file nor folder"
    suffix = _suffix(entry)
    if suffix in readable_suffixes():
        return None
    return f"of suffix {suffix}, which is not read" if suffix else "without a suffix"


def _leads_to(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link that leads to itself
        return False


def _suffix(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()


def _label(found: _Found, classes: Sequence[str], all_of_them: bool) -> SplitFiles:
    """Labels the images of class folders; of a test set, `all_of_them`, the others are kept where they may be meant."""
    images = [found.images.get(name, []) for name in classes]
    others = [file for name, files in found.images.items() if name not in classes for file in files]
    if all_of_them:
        for kind, names in (
            (BROKEN_LINK, found.broken),
            ("without images", [name for name, files in found.images.items() if not files]),
        ):
            if names:
                found.passed_over.add(kind, *names)
    if all_of_them and not any(images):
        others += found.loose
    elif found.loose:
        found.passed_over.add("beside the class folders", *(file.name for file in found.loose))
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
            level = logging.INFO if set(tally) == {HIDDEN} else logging.WARNING
            logger.log(level, "passed over in '%s': %s", root / split, tally)
    beside = [entry.name for entry in _entries(root) if _why_not(entry) is None]
    if beside := [name for name in beside if name not in ("train", *OPTIONAL_SPLITS)]:
        logger.info("passed over in '%s': %s", root, Tally({"beside train, val and test": [*beside]}))


def _count(labels: Tensor, classes: Sequence[str]) -> str:
    *counts, unlabelled = torch.bincount(labels, minlength=len(classes) + 1).tolist()
    parts = [f"{unlabelled} without a label"] if unlabelled else []
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    if len(missing) < len(classes):
        named = ", ".join(f"'{name}'" for name in missing[:5])
        lacking = f" (none of {named}{' and others' if len(missing) > 5 else ''})" if missing else ""
        parts.insert(0, f"{sum(counts)} of {len(classes) - len(missing)} classes{lacking}")
    return " and ".join(parts) or "none"


def _check_classes(root: Path, found: _Found) -> None:
    """Makes sure that every class has images, and that there are classes at all."""
    _refuse_broken(root, found)
    if not found.images:
        raise UserError(f"folder '{root}' has no class folders: images are expected in '{root}/<class>/'.")
    for name, images in found.images.items():
        if not images:
            passed_over = f" (passed over: {found.passed_over})" if found.passed_over else ""
            raise UserError(
                f"class folder '{root / name}' has no images: put some there (.png, .jpg and other formats that Pillow "
                f"reads) or remove the folder{passed_over}."
            )


def _refuse_broken(root: Path, found: _Found) -> None:
    for name in found.broken:
        raise UserError(
            f"'{root / name}' is a link to '{os.readlink(root / name)}', which does not exist: mend or remove it, "
            "since it may be a class."
        )


def _check_validation_classes(root: Path, classes: set[str], found: _Found) -> None:
    """Makes sure that validation images are of the classes of training, and of all of them."""
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
