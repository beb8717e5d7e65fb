"""Files of images that are made once and then mapped into memory by every process and every run.

The decoded images of a folder are kept in one such file for each split, named by what its pixels depend on: the names,
sizes and times of change of the image files, the form they are brought to, and the library that decodes them. Hence
nothing stale is ever opened, and files for several forms lie side by side.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
from filelock import FileLock, Timeout
from PIL import features
from pytorch_lightning.utilities import rank_zero_only

from bioprop.files import readable, replacing

logger = logging.getLogger(__name__)

FOLDER = ".bioprop-cache"
#: Number to raise when images are decoded to other pixels.
VERSION = 2
Opened = TypeVar("Opened")


def open_images(path: Path) -> np.ndarray | None:
    """Maps a file into memory, uint8 [images, channels, height, width]; None where it is missing, cut or another."""
    try:
        images = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(images) if images.dtype == np.uint8 and images.ndim == 4 else None


def write_images(path: Path, blocks: Iterable[np.ndarray]) -> None:
    """Writes blocks of images, uint8 [block, channels, height, width], into a file that takes its name once whole."""
    count, header = 0, {"descr": "|u1", "fortran_order": False}
    with replacing(path) as file:
        for block in blocks:
            if not count:  # in place of the header, which is as long for any number of images
                np.lib.format.write_array_header_1_0(file, {**header, "shape": block.shape})
            file.write(np.ascontiguousarray(block))
            count += len(block)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *block.shape[1:])})


def made_once(lock: Path, ready: Callable[[], Opened | None], make: Callable[[], object], what: str) -> Opened:
    """Opens files by `ready`, after `make` made them where that gives None: in one process, while others wait for it.

    The lock is the operating system's and ends with the process that holds it; an interrupted `make` is to leave
    nothing that `ready` opens. `what` says what the other process is doing.

    Raises:
        OSError: The folder cannot be written to, or what was made there cannot be opened.
        NotImplementedError: The folder lies in a network file system without locks.
    """
    if (opened := ready()) is None:
        lock.parent.mkdir(parents=True, exist_ok=True)
        locked = FileLock(lock)
        try:
            locked.acquire(timeout=0)
        except Timeout:
            _inform("Another process is %s: waiting for it.", what)
            locked.acquire()
        try:
            if (opened := ready()) is None:
                make()
                opened = ready()
        finally:
            locked.release()
    if opened is None:
        raise OSError(f"what was written into '{lock.parent}' cannot be read back")
    return opened


def kept_images(
    root: Path, split: str, files: Sequence[Path], form: object, decode: Callable[[], Iterable[np.ndarray]] | None
) -> np.ndarray | None:
    """Opens the decoded images of a split, in the data folder `root` or in the user's cache folder.

    Where they are not there they are decoded, and the files of image files that have changed are removed. `form` is
    what the form depends on that all `files` of the split are brought to, by its `repr`.

    Returns:
        uint8 [files, channels, height, width]; None without `decode` where they are not there, and where there is no
        place to keep them, which is said.

    Raises:
        UserError: An image file cannot be used.
    """
    files_and_times, name = _name(root, split, files, form)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bioprop"
    paths = [root / FOLDER / name, cache / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16] / name]
    found = next((images for path in paths if (images := open_images(path)) is not None), None)
    if found is not None or decode is None:
        return found

    def make(path: Path) -> None:
        _inform("decoding %d images of %s, kept in '%s' for all runs", len(files), split, readable(path))
        write_images(path, decode())
        for other in path.parent.glob(f"{split}-*"):
            if not other.name.startswith(files_and_times):
                other.unlink(missing_ok=True)

    reasons = []
    for path in paths:
        what = f"decoding the images of '{readable(root / split)}'"
        try:
            return made_once(path.parent / f"{split}.lock", partial(open_images, path), partial(make, path), what)
        except (OSError, NotImplementedError) as error:  # the second: a network file system without locks
            reasons.append(error)
    _warn("the decoded images of '%s' cannot be kept (%s): every run decodes them", readable(root / split), reasons[0])
    return None


def _name(root: Path, split: str, files: Sequence[Path], form: object) -> tuple[str, str]:
    """Returns the name of the file for some image files, as they are now, in a form; before it the first part of it."""
    stamps = hashlib.sha256(b"%d" % VERSION)
    for file in files:
        status = file.stat()
        name = os.fsencode(file.relative_to(root))
        stamps.update(b"%d %d %d %s" % (len(name), status.st_size, status.st_mtime_ns, name))
    codecs = {name: features.version(name) for name in (*features.get_supported_codecs(), "webp", "avif")}
    by = hashlib.sha256(repr((form, PIL.__version__, codecs)).encode())
    first = f"{split}-{stamps.hexdigest()[:24]}"
    return first, f"{first}-{by.hexdigest()[:16]}.npy"


_inform, _warn = rank_zero_only(logger.info), rank_zero_only(logger.warning)
