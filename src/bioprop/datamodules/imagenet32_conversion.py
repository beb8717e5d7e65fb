"""ImageNet 32x32 as one file of pixels a set, which many processes can map into memory at once."""

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress

from bioprop.datamodules.imagenet32_files import COUNTS, Source, StoredSet, find_source, verify
from bioprop.datamodules.imagenet32_parts import IMAGE_BYTES, IMAGE_SHAPE, read_part
from bioprop.errors import UserError

logger = logging.getLogger(__name__)

WHERE_TO_GET_IT = (
    "log in at image-net.org, go to Download, Downsampled image data, and get Imagenet32_{0}_npz.zip (or "
    "Imagenet32_{0}.zip, the pickles)"
)


class Converted(NamedTuple):
    """A set, ready for use: uint8 [images, 3, 32, 32] mapped from its file, and int64 [images], in memory."""

    images: np.ndarray
    labels: np.ndarray


class _Record(NamedTuple):
    """What is remembered of a conversion: number of images, whether the source was checked, and which it was."""

    images: int
    verified: bool
    source: dict[str, list[int]]

    @classmethod
    def read(cls, paths: "_Paths") -> "_Record | None":
        """Returns what is written about the converted files, if they are whole."""
        # a file that is no record of ours counts as none
        with suppress(OSError, ValueError, TypeError, KeyError):
            content = json.loads(paths.record.read_text())
            record = cls(int(content["images"]), bool(content["verified"]), dict(content["source"]))
            whole = _header_bytes() + record.images * IMAGE_BYTES
            return record if paths.labels.is_file() and paths.images.stat().st_size == whole else None
        return None

    def write(self, paths: "_Paths") -> None:
        """Writes the record, at once."""
        _partial(paths.record).write_text(json.dumps(self._asdict(), indent=2))
        _partial(paths.record).replace(paths.record)


class _Paths(NamedTuple):
    """The files of a converted set; the record is written last, so that the others are whole where it exists."""

    images: Path
    labels: Path
    record: Path
    lock: Path

    @classmethod
    def of(cls, folder: Path, stored: StoredSet) -> "_Paths":
        stem = f"imagenet32_{stored}"
        return cls(
            folder / f"{stem}_images.npy",
            folder / f"{stem}_labels.npy",
            folder / f"{stem}.json",
            folder / f".{stem}.lock",
        )


def open_converted(data_dir: Path, folder: Path, stored: StoredSet, check: bool) -> Converted:
    """Opens a set, after converting it where that has not been done yet.

    Of several processes that come here at once, one converts and the others wait. The lock is the operating system's
    and ends with the process that holds it. An interrupted conversion leaves nothing that is read: the files get their
    names when they are whole.

    Args:
        data_dir: Folder of the published files.
        folder: Folder of the converted files.
        stored: Which set.
        check: Compare sizes and checksums with the published ones, unless a record says that it has been done.

    Raises:
        UserError: The files are missing, damaged or others than the published ones, or there is no place to convert to.
    """
    paths = _Paths.of(folder, stored)
    if not _is_ready(paths, data_dir, stored, check):
        source = find_source(data_dir, stored)
        if source is None:
            raise UserError(
                f"ImageNet 32x32's {stored} images are not in '{data_dir}' and cannot be downloaded without you: "
                f"{WHERE_TO_GET_IT.format(stored)}, and put it there, as it is or unpacked."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(paths.lock, stored):
                if not _is_ready(paths, data_dir, stored, check):
                    _prepare(paths, source, stored, check)
        except (OSError, NotImplementedError) as error:  # the second: a network file system without locks
            raise UserError(
                f"ImageNet 32x32 cannot be converted into '{folder}' ({error}): name a folder that "
                "can be written to, with room for the files, as converted_dir."
            ) from error
    return Converted(np.asarray(np.load(paths.images, mmap_mode="r")), np.load(paths.labels))


def _is_ready(paths: _Paths, data_dir: Path, stored: StoredSet, check: bool) -> bool:
    """Whether the converted files are whole, checked if they have to be, and not of other files than lie there now."""
    record = _Record.read(paths)
    if record is None or record.verified:
        return record is not None
    source = find_source(data_dir, stored)
    return not check and (source is None or source.stamps() == record.source)


@contextmanager
def _locked(path: Path, stored: StoredSet) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("Another process is converting the %s images of ImageNet 32x32: waiting for it.", stored)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(paths: _Paths, source: Source, stored: StoredSet, check: bool) -> None:
    """Checks the published files and converts them; files that are converted already are only checked."""
    record, stamps = _Record.read(paths), source.stamps()
    if check:
        with _progress("checking ImageNet 32x32") as advance:
            verify(source, advance)
    if record is None or record.source != stamps or record.images != sum(COUNTS[stored]):
        for path in (paths.record, *map(_partial, paths[:3])):  # of another source, or of an interrupted conversion
            path.unlink(missing_ok=True)
        _refuse_too_small_a_disk(source, paths.images.parent)
        with _progress("converting ImageNet 32x32") as advance:
            record = _Record(_convert(source, paths, stored, check, advance), check, stamps)
    record._replace(verified=check).write(paths)


def _convert(source: Source, paths: _Paths, stored: StoredSet, check: bool, advance: Callable[[float], None]) -> int:
    """Writes the file of images, part by part, and that of labels, under other names first."""
    share = 1 / len(source.parts)
    labels = []
    partial = [_partial(paths.images), _partial(paths.labels)]
    try:
        with partial[0].open("wb") as images, partial[1].open("wb") as all_labels:
            _write_header(images, 0)
            for part, expected in zip(source.parts, COUNTS[stored], strict=True):

                def write(data: bytes, expected: int = expected) -> None:
                    images.write(data)
                    advance(len(data) / (expected * IMAGE_BYTES) * share)

                labels.append(read_part(source, part, paths.images.parent, write))
                if check and len(labels[-1]) != expected:
                    raise UserError(
                        f"'{part}' has {len(labels[-1]):,} images and the published one {expected:,}: download it "
                        "again, or set verify to false if you mean to use another."
                    )
            count = sum(map(len, labels))
            images.seek(0)
            _write_header(images, count)
            np.save(all_labels, np.concatenate(labels))
            for file in (images, all_labels):  # on the disk before its name is, should the power fail
                file.flush()
                os.fsync(file.fileno())
        partial[0].replace(paths.images)
        partial[1].replace(paths.labels)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return count


def _write_header(file: IO[bytes], count: int) -> None:
    """Writes the beginning of a .npy file; it is as long for any number of images."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *IMAGE_SHAPE)})


def _header_bytes() -> int:
    file = BytesIO()
    _write_header(file, 0)
    return file.tell()


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _refuse_too_small_a_disk(source: Source, folder: Path) -> None:
    need = _bytes_to_write(source)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"converting ImageNet 32x32 needs {need / 1e9:.1f} GB in '{folder}', where {free / 1e9:.1f} GB are free: "
            "make room, or name another folder as converted_dir."
        )


def _bytes_to_write(source: Source) -> int:
    """An estimate from above: npz files are smaller than their images by a tenth, pickles are not."""
    factor = 1.25 if source.npz else 1.0
    if source.archive is None:
        return int(factor * sum(file.stat().st_size for file in source.files))
    with zipfile.ZipFile(source.archive) as archive:
        sizes = [archive.getinfo(part).file_size for part in source.parts]
    return int(factor * sum(sizes)) + (max(sizes) if source.npz else 0)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[float], None]]:
    """Shows a bar on a terminal; gives what moves it on, by shares of the whole."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda share: progress.advance(task, share)
