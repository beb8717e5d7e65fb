"""The decoded images of a folder, kept in one file for each split, which all processes and runs map into memory.

A file is named by what its pixels depend on: the names, sizes and times of change of the image files, the form they are
brought to, and the library that decodes them. Hence nothing stale is ever opened, and files for several forms lie side
by side. It is a .npy file of uint8 [images, channels, height, width] with a record in JSON behind the pixels.
"""

import errno
import hashlib
import io
import json
import logging
import os
import zlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import features
from pytorch_lightning.utilities import rank_zero_only

from bioprop.datamodules.base import Split
from bioprop.datamodules.image_files import Form, Notes, decoded, unreadable
from bioprop.datamodules.mapped_files import lack_of_room, made_once, write_header
from bioprop.files import readable, replacing

logger = logging.getLogger(__name__)

FOLDER = ".bioprop-cache"
#: Number to raise when images are decoded to other pixels, or notes are worded differently.
VERSION = 1
#: Files that are kept for each split, the newest; each is for another form.
MOST = 4
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Kept(NamedTuple):
    """The decoded images of a split, uint8 [images, channels, height, width], mapped from a file, and their notes."""

    images: np.ndarray
    notes: Notes


def find_kept(root: Path, split: Split, files: Sequence[Path], form: Form) -> Kept | None:
    """Opens the decoded images of a split where they were kept, beside it or in the user's cache folder.

    Args:
        root: The data folder.
        split: Name of the split.
        files: All its image files, in order.
        form: The form that they are brought to.

    Returns:
        None where they were not kept, or are damaged, or any of the image files has changed.

    Raises:
        UserError: An image file is gone.
    """
    name = _name(root, split, files, form)
    found = (_open(place / name, len(files), form) for place in _places(root))
    return next((kept for kept in found if kept is not None), None)


def keep(root: Path, split: Split, files: Sequence[Path], form: Form) -> Kept | None:
    """Opens the decoded images of a split, after decoding them where that has not been done yet.

    Of several processes that come here at once, one decodes and the others wait. A file takes its name when it is
    whole, and then those of image files that have changed are removed.

    Args:
        root: The data folder.
        split: Name of the split.
        files: All its image files, in order, at least one.
        form: The form to bring them to.

    Returns:
        None where there is no place to keep them, which is said.

    Raises:
        UserError: An image file cannot be used.
    """
    name, reason = _name(root, split, files, form), ""
    for place in _places(root):
        path = place / name
        try:
            return made_once(
                place / f"{split}.lock",
                lambda path=path: _open(path, len(files), form),  # type: ignore[misc]
                lambda path=path: _make(path, split, files, form),  # type: ignore[misc]
                f"Another process is decoding the images of '{readable(root / split)}'",
            )
        except (OSError, NotImplementedError) as error:  # the second: a network file system without locks
            reason = reason or str(error)
            if isinstance(error, OSError) and error.errno in FULL:
                break
    _warn("the decoded images of '%s' cannot be kept (%s): every run decodes them anew", readable(root / split), reason)
    return None


def _places(root: Path) -> tuple[Path, Path]:
    """Returns the folder of kept files in the data folder, and that in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / FOLDER, cache / "bioprop" / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]


def _name(root: Path, split: Split, files: Sequence[Path], form: Form) -> str:
    """Returns the name of the file for some image files, as they are now, in a form."""
    stamps = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise unreadable(file, error) from error
        name = os.fsencode(file.relative_to(root))
        stamps.update(b"%d %d %d %s" % (len(name), status.st_size, status.st_mtime_ns, name))
    codecs = {name: features.version(name) for name in (*features.get_supported_codecs(), "webp", "avif")}
    by = hashlib.sha256(repr((tuple(form), VERSION, PIL.__version__, codecs)).encode())
    return f"{split}-{stamps.hexdigest()[:24]}-{by.hexdigest()[:16]}.npy"


def _open(path: Path, count: int, form: Form) -> Kept | None:
    """Opens a file if it is whole, by its checksum, and the one that its name says."""
    header, shape = io.BytesIO(), (count, *form.shape)
    write_header(header, shape)
    try:
        with path.open("rb") as file:
            if file.read(header.tell()) != header.getvalue():
                return None
            images = np.memmap(path, np.uint8, "r", header.tell(), shape)
            file.seek(images.nbytes, os.SEEK_CUR)
            record = json.loads(file.read())
        notes: Notes = {int(place): kinds for place, kinds in record["notes"].items()}
        whole = record["name"] == path.name and record["checksum"] == _checksum(notes, zlib.crc32(images.data))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # as for a record that is none of ours
        return None
    return Kept(np.asarray(images), notes) if whole else None


def _checksum(notes: Notes, of_pixels: int) -> int:
    return zlib.crc32(json.dumps(notes).encode(), of_pixels)


def _make(path: Path, split: Split, files: Sequence[Path], form: Form) -> None:
    """Decodes files into one, and removes those that it replaces; to be called by one process at a time."""
    if path.exists():
        _warn("'%s' is damaged, and made anew", readable(path))
    for part in path.parent.glob(f"{split}-*.part"):  # of a process that was killed
        part.unlink(missing_ok=True)
    shape = (len(files), *form.shape)
    if lack := lack_of_room(path.parent, int(np.prod(shape, dtype=object))):
        raise OSError(errno.ENOSPC, f"it {lack}")
    _inform("decoding %d images of %s, kept in '%s' for all runs", len(files), split, readable(path))
    pixels, notes = 0, Notes()
    with replacing(path) as file, closing(decoded(files, form)) as blocks:
        write_header(file, shape)
        for block, of_block in blocks:
            file.write(block)
            pixels = zlib.crc32(block.data, pixels)
            notes |= of_block
        record = {"name": path.name, "checksum": _checksum(notes, pixels), "notes": notes}
        file.write(json.dumps(record).encode())
    _remove_replaced(path, split)


def _remove_replaced(path: Path, split: Split) -> None:
    """Removes the files of image files that have changed, and of the others all but the newest."""
    of_these_files = path.name.rpartition("-")[0]
    kept = sorted(path.parent.glob(f"{split}-*.npy"), key=lambda other: (other != path, -other.stat().st_mtime_ns))
    others = [other for other in kept if other.name.rpartition("-")[0] == of_these_files]
    for other in set(kept) - set(others[:MOST]):
        other.unlink(missing_ok=True)


_inform, _warn = rank_zero_only(logger.info), rank_zero_only(logger.warning)
