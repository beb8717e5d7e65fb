"""Which files of a folder are images, of which class, and which are passed over, and why."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, features

from bioprop.datamodules.tally import Tally
from bioprop.errors import UserError

#: Formats that Pillow names but does not decode itself: films, containers of numbers, programs for other interpreters.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
HIDDEN = "hidden"
BROKEN_LINK = "linked to nothing"


class Found(NamedTuple):
    """What lies in the folder of one split.

    `images` are those of every class folder, and of its sub-folders, in alphabetical order; `loose` are those beside
    the class folders; `broken` are names of links that lead nowhere and may have been class folders.
    """

    images: dict[str, list[Path]]
    loose: list[Path]
    broken: list[str]
    passed_over: Tally


@cache
def readable_suffixes() -> frozenset[str]:
    """Returns the suffixes, in lower case, of the image formats that the installed Pillow decodes."""
    missing = NO_PICTURES if features.check("jpg_2000") else {*NO_PICTURES, "JPEG2000"}
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in Image.OPEN and name not in missing)


def list_split(folder: Path) -> Found:
    """Lists the images of one split, `folder/<class>/**`, classes and files in alphabetical order.

    Raises:
        UserError: A folder is missing or may not be read.
    """
    if not folder.is_dir():
        raise UserError(f"folder '{folder}' does not exist: images are expected in '{folder}/<class>/'.")
    found = Found({}, [], [], Tally())
    for entry in _entries(folder):
        if entry.name.startswith("."):
            found.passed_over.add(HIDDEN, entry.name)
        elif _leads_to(entry.is_dir):
            found.images[entry.name] = list(_walk(folder, Path(entry.path), found.passed_over))
        elif (reason := _no_image(entry)) is not None:
            if reason == BROKEN_LINK and _suffix(entry) not in readable_suffixes():
                found.broken.append(entry.name)
            else:
                found.passed_over.add(reason, entry.name)
        else:
            found.loose.append(Path(entry.path))
    return found


def _walk(root: Path, folder: Path, passed_over: Tally) -> Iterator[Path]:
    """Gives the images of a folder and its sub-folders, by their paths in alphabetical order."""
    images: list[str] = []
    waiting: list[tuple[str, tuple[str, ...]]] = [(str(folder), (os.path.realpath(root), os.path.realpath(folder)))]
    while waiting:
        place, above = waiting.pop()
        for entry in _entries(Path(place)):
            if entry.name.startswith("."):
                reason: str | None = HIDDEN
            elif _leads_to(entry.is_dir):
                target = os.path.realpath(entry.path)
                reason = "linked to a folder above" if target in above else None
                if reason is None:
                    waiting.append((entry.path, (*above, target)))
            else:
                reason = _no_image(entry)
                if reason is None:
                    images.append(entry.path)
            if reason is not None:
                passed_over.add(reason, Path(entry.path).relative_to(root))
    return map(Path, sorted(images))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"folder '{folder}' cannot be read ({error.strerror}): permit it, or move it away.") from error


def may_hold_images(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a folder itself, or a file named like an image, and not hidden."""
    return not entry.name.startswith(".") and (_leads_to(entry.is_dir) or _no_image(entry) is None)


def _leads_to(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link that leads to itself
        return False


def _no_image(entry: os.DirEntry[str]) -> str | None:
    """Why what is no folder is passed over; None for an image."""
    if not _leads_to(entry.is_file):
        return BROKEN_LINK if entry.is_symlink() else "neither file nor folder"
    suffix = _suffix(entry)
    if suffix in readable_suffixes():
        return None
    return f"of suffix {suffix}, which is not read" if suffix else "without a suffix"


def _suffix(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()
