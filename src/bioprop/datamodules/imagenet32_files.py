"""The published files of ImageNet 32x32, and the one file of pixels that is made of each set."""

import hashlib
import json
import logging
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from bioprop.datamodules.array_pickles import load_arrays
from bioprop.datamodules.kept_images import made_once, open_images, write_images
from bioprop.errors import UserError
from bioprop.files import replacing

logger = logging.getLogger(__name__)

StoredSet = Literal["train", "val"]
IMAGE_SHAPE = (3, 32, 32)
IMAGE_BYTES = 3 * 32 * 32
NUM_CLASSES = 1000
#: Images in each part of each set, in order.
COUNTS: dict[StoredSet, tuple[int, ...]] = {"train": (128_116,) * 9 + (128_123,), "val": (50_000,)}
#: Size in bytes and sha256 of the zip archives of npz files, as published; of the pickles none are.
ARCHIVES = {
    "Imagenet32_train_npz.zip": (3_580_435_279, "94226337ecc1b0309d9fcd0167127aaadc931587035fbcb53925235edbaec4fc"),
    "Imagenet32_val_npz.zip": (139_697_668, "013990e6dec1237dcd1f9beadbab81ead6604cc119af5cacbfb59ae28148377a"),
}


class Member(NamedTuple):
    """A file inside an archive.

    Attributes:
        archive: The zip archive.
        inside: Name of the file in it, folders included.
    """

    archive: Path
    inside: str

    def __str__(self) -> str:
        """Returns the path as if the archive were a folder."""
        return str(self.archive / self.inside)

    @property
    def name(self) -> str:
        """Name of the file alone."""
        return self.inside.rpartition("/")[2]

    @contextmanager
    def open(self, mode: Literal["rb"]) -> Iterator[IO[bytes]]:
        """Opens the file, and closes the archive with it."""
        with zipfile.ZipFile(self.archive) as archive, archive.open(self.inside) as file:
            yield file


#: An unpacked file, or one inside an archive.
Part = Path | Member
#: A set, ready for use: uint8 [images, 3, 32, 32] mapped from its file, and int64 [images], in memory.
Converted = tuple[np.ndarray, np.ndarray]
ANOTHER = "download it again, or set verify to false if you mean to use another"


def open_converted(data_dir: Path, folder: Path, stored: StoredSet, check: bool) -> Converted:
    """Opens a set, after converting it from `data_dir` into `folder` where that has not been done yet.

    An interrupted conversion leaves nothing that is read: the files get their names when they are whole, the record of
    them last. To `check` is to compare sizes and checksums with the published ones, if that was not done before.

    Raises:
        UserError: The files are missing, damaged or others than the published ones, or there is no place to convert to.
    """
    stem = folder / f"imagenet32_{stored}"
    if (ready := _ready(stem, data_dir, stored, check)) is not None:
        return ready
    parts = find_source(data_dir, stored)
    if not parts:
        raise UserError(
            f"ImageNet 32x32's {stored} images are not in '{data_dir}' and cannot be downloaded without you: log in at "
            f"image-net.org, go to Download, Downsampled image data, and get Imagenet32_{stored}_npz.zip (or "
            f"Imagenet32_{stored}.zip, the pickles), and put it there, as it is or unpacked."
        )
    try:
        return made_once(
            folder / f".{stem.name}.lock",
            lambda: _ready(stem, data_dir, stored, check),
            lambda: _convert(stem, parts, stored, check),
            f"converting the {stored} images of ImageNet 32x32",
        )
    except (OSError, NotImplementedError) as error:  # the second: a network file system without locks
        raise UserError(
            f"ImageNet 32x32 cannot be converted into '{folder}' ({error}): name a folder that can be written to, with "
            "room for the files, as converted_dir."
        ) from error


def find_source(folder: Path, stored: StoredSet) -> list[Part]:
    """Finds the parts of a set, in order: the archive of npz files (whose checksum is published) before others.

    Unpacked files may lie in `folder` or in the archive's own folder, `folder/Imagenet32_train_npz` and so on.

    Raises:
        UserError: Some parts are there and others are missing, or an archive is none.
    """
    stems = [f"train_data_batch_{number}" for number in range(1, 11)] if stored == "train" else ["val_data"]
    for suffix, extension in (("_npz", ".npz"), ("", "")):
        archive = folder / f"Imagenet32_{stored}{suffix}.zip"
        names = [stem + extension for stem in stems]
        if archive.is_file():
            return _members(archive, names)
        for place in (folder, archive.with_suffix(""), folder / stored):
            parts = [place / name for name in names]
            missing = [part for part in parts if not part.is_file()]
            if not missing:
                return [*parts]
            if len(missing) < len(parts):
                raise UserError(
                    f"'{missing[0]}' is missing, though other parts of ImageNet 32x32 are there: put all {len(parts)} "
                    "parts into one folder, or the archive as it was downloaded."
                )
    return []


def _members(archive: Path, names: list[str]) -> list[Part]:
    try:
        with zipfile.ZipFile(archive) as opened:
            inside = {member.name: member for member in (Member(archive, name) for name in opened.namelist())}
        return [inside[name] for name in names]
    except zipfile.BadZipFile as error:
        raise UserError(f"'{archive}' is not a readable zip archive ({error}): download it again.") from error
    except KeyError as error:
        raise UserError(f"'{archive}' has no {error} in it, as the published one has: download it again.") from error


def _on_disk(part: Part) -> Path:
    return part if isinstance(part, Path) else part.archive


def _stamps(parts: list[Part]) -> dict[str, list[int]]:
    """Returns size in bytes and time of change of each file, which tell whether it is the same as another time."""
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in map(_on_disk, parts)}


def _ready(stem: Path, data_dir: Path, stored: StoredSet, check: bool) -> Converted | None:
    """Opens the converted files if they are whole, checked if they have to be, and of the files that lie there now."""
    with suppress(OSError, ValueError, TypeError, KeyError):  # a file that is no record of ours counts as none
        record = json.loads(stem.with_suffix(".json").read_text())
        count, verified, stamps = record["images"], record["verified"], record["source"]
        images, labels = open_images(Path(f"{stem}_images.npy")), np.load(f"{stem}_labels.npy")
        if images is not None and images.shape == (count, *IMAGE_SHAPE) and len(labels) == count:
            source = None if verified or check else find_source(data_dir, stored)
            if verified or (not check and (not source or _stamps(source) == stamps)):
                return images, labels
    return None


def _convert(stem: Path, parts: list[Part], stored: StoredSet, check: bool) -> None:
    """Checks the published files; writes the images, part by part, then the labels, then the record of both."""
    stamps, labels = _stamps(parts), []
    logger.info("Converting the %s images of ImageNet 32x32, which is done once and takes a while.", stored)
    if check:
        verify(_on_disk(parts[0]))

    def read() -> Iterator[np.ndarray]:
        for part, expected in zip(parts, COUNTS[stored], strict=True):
            images, of_part = read_part(part)
            if check and len(images) != expected:
                raise UserError(f"'{part}' has {len(images):,} images and the published one {expected:,}: {ANOTHER}.")
            labels.append(of_part)
            yield images.reshape(-1, *IMAGE_SHAPE)

    stem.with_suffix(".json").unlink(missing_ok=True)
    write_images(Path(f"{stem}_images.npy"), read())
    with replacing(f"{stem}_labels.npy") as file:
        np.save(file, np.concatenate(labels))
    with replacing(stem.with_suffix(".json"), "w") as file:
        json.dump({"images": sum(map(len, labels)), "verified": check, "source": stamps}, file, indent=2)


def verify(archive: Path) -> None:
    """Refuses an archive that differs in size or checksum from the published one; of other files none are published."""
    if archive.name not in ARCHIVES:
        return
    size, sha256 = ARCHIVES[archive.name]
    if (found := archive.stat().st_size) != size:
        raise UserError(f"'{archive}' is {found:,} bytes long and the published one {size:,}: {ANOTHER}.")
    with archive.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise UserError(f"'{archive}' is damaged or not the published one, by its sha256 checksum: {ANOTHER}.")


def read_part(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Reads one part of a set into memory (394 MB of images).

    Returns:
        The images, uint8 [images, 3072], planes red, green and blue; and the labels, int64 [images], counted from 0.

    Raises:
        UserError: The file is damaged, or is not of the published format.
    """
    try:
        with part.open("rb") as file:
            content = _read_npz(file) if part.name.endswith(".npz") else load_arrays(file, str(part))
            file.read()  # to the end, where an archive's checksum is compared
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, MemoryError) as error:
        raise UserError(f"'{part}' is damaged ({error}): download it again.") from error
    data, labels = np.asarray(content.get("data")), np.asarray(content.get("labels"))
    if (
        (data.dtype != np.uint8 or data.shape != (data.size // IMAGE_BYTES, IMAGE_BYTES))
        or (labels.dtype.kind not in "iu" or labels.shape != data.shape[:1])
        or not (labels.min(initial=1) == 1 and labels.max(initial=1) <= NUM_CLASSES)
    ):
        raise UserError(
            f"'{part}' is not a file of ImageNet 32x32, which holds data, uint8 [images, {IMAGE_BYTES}], and labels, "
            f"whole numbers from 1 to {NUM_CLASSES} [images], but data, {data.dtype} {list(data.shape)}, and labels, "
            f"{labels.dtype} {list(labels.shape)}: is it of another size (64x64, 16x16), or another file?"
        )
    return data, labels.astype(np.int64) - 1


def _read_npz(file: IO[bytes]) -> dict[str, np.ndarray]:
    content = {}
    for key in ("data", "labels"):
        with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as member:
            content[key] = np.lib.format.read_array(member, allow_pickle=False)
            member.read()
    return content
