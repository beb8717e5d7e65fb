"""Reading one published file of ImageNet 32x32, npz or pickle, as a stream of pixels."""

import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from shutil import copyfileobj
from typing import IO, Any

import numpy as np

from bioprop.datamodules.array_pickles import load_arrays
from bioprop.datamodules.imagenet32_files import CHUNK, Source
from bioprop.errors import UserError

IMAGE_SHAPE = (3, 32, 32)
IMAGE_BYTES = 3 * 32 * 32
NUM_CLASSES = 1000

Write = Callable[[Any], object]


def read_part(source: Source, part: str, scratch: Path, write: Write) -> np.ndarray:
    """Writes the images of one part, as they are stored: a row an image, its planes red, green and blue.

    Args:
        source: The files.
        part: One of `source.parts`.
        scratch: Folder for a nameless copy of an npz file that is packed inside an archive.
        write: Takes the next bytes; called with a few megabytes at a time for npz, all at once for pickles.

    Returns:
        The labels, int64 [images], counted from 0 (in the files: from 1).

    Raises:
        UserError: The file is damaged, or is not of the published format.
    """
    name = PurePath(part) if source.archive is None else source.archive / part
    with _opened(source, part, scratch) as file:
        count, labels = (_read_npz if source.npz else _read_pickle)(file, name, write)
    try:
        labels = np.asarray(labels).astype(np.int64, casting="same_kind")
    except (TypeError, ValueError) as error:
        raise _unlike(name, "its labels are not whole numbers") from error
    if labels.shape != (count,):
        raise _unlike(name, f"it has {count} images and labels of shape {labels.shape}")
    if count and not 1 <= labels.min() <= labels.max() <= NUM_CLASSES:
        raise _unlike(name, f"its labels are from {labels.min()} to {labels.max()}, not 1 to {NUM_CLASSES}")
    return labels - 1


@contextmanager
def _opened(source: Source, part: str, scratch: Path) -> Iterator[IO[bytes]]:
    """Opens a part to be read; an npz file inside an archive as a copy, since it has to be read from its end first."""
    with ExitStack() as stack:
        if source.archive is None:
            yield stack.enter_context(open(part, "rb"))
            return
        try:
            packed = stack.enter_context(stack.enter_context(zipfile.ZipFile(source.archive)).open(part))
            if source.npz:
                copy = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
                copyfileobj(packed, copy, CHUNK)
                copy.seek(0)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _damaged(source.archive / part, error) from error
        yield copy if source.npz else packed


def _read_npz(file: IO[bytes], name: PurePath, write: Write) -> tuple[int, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            with archive.open("labels.npy") as member:
                labels = np.lib.format.read_array(member, allow_pickle=False)
            with archive.open("data.npy") as member:
                shape, fortran, dtype = _read_header(member)
                count = _count(name, shape, dtype, contiguous=not fortran)
                left = count * IMAGE_BYTES
                while chunk := member.read(CHUNK):  # to the end: the archive's own checksum is compared there
                    write(chunk)
                    left -= len(chunk)
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError) as error:
        raise _damaged(name, error) from error
    if left:
        raise _damaged(name, f"{count * IMAGE_BYTES - left:,} of {count * IMAGE_BYTES:,} bytes of images")
    return count, labels


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"npy format {version}")
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = read[version](member)
    return header


def _read_pickle(file: IO[bytes], name: PurePath, write: Write) -> tuple[int, Any]:
    content = load_arrays(file, name)
    for key in ("data", "labels"):
        if key not in content:
            raise _unlike(name, f"it has no '{key}'")
    data = content["data"]
    if not isinstance(data, np.ndarray):
        raise _unlike(name, "its 'data' is no array")
    count = _count(name, data.shape, data.dtype, contiguous=data.flags.c_contiguous)
    write(data.data.cast("B") if count else b"")
    return count, content["labels"]


def _count(name: PurePath, shape: tuple[int, ...], dtype: np.dtype[Any], contiguous: bool) -> int:
    """Returns the number of images, where the array of images is what it should be."""
    if dtype != np.uint8 or len(shape) != 2 or shape[1] != IMAGE_BYTES or not contiguous:
        raise _unlike(name, f"its images are {dtype} {list(shape)}, not uint8 [images, {IMAGE_BYTES}]")
    return shape[0]


def _damaged(name: PurePath, reason: object) -> UserError:
    return UserError(f"'{name}' is damaged ({reason}): download it again.")


def _unlike(name: PurePath, difference: str) -> UserError:
    return UserError(
        f"'{name}' is not a file of ImageNet 32x32, because {difference}: is it of another size (64x64, 16x16), or "
        "another file of the same name?"
    )
