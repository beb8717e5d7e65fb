"""The published files of ImageNet 32x32: where they are found, and whether they are whole."""

import hashlib
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from bioprop.errors import UserError

StoredSet = Literal["train", "val"]

CHUNK = 2**22


class Archive(NamedTuple):
    """What is known of a published archive."""

    size: int  # bytes
    sha256: str


#: The zip archives of npz files, as published. No checksums are published of the pickles.
ARCHIVES = {
    "Imagenet32_train_npz.zip": Archive(
        3_580_435_279, "94226337ecc1b0309d9fcd0167127aaadc931587035fbcb53925235edbaec4fc"
    ),
    "Imagenet32_val_npz.zip": Archive(139_697_668, "013990e6dec1237dcd1f9beadbab81ead6604cc119af5cacbfb59ae28148377a"),
}
#: Images in each part of each set, in order.
COUNTS: dict[StoredSet, tuple[int, ...]] = {"train": (128_116,) * 9 + (128_123,), "val": (50_000,)}


class Source(NamedTuple):
    """The files that one set can be read from.

    Attributes:
        archive: The zip archive that holds the parts; None where the parts lie in the folder themselves.
        parts: The files of images and labels, in order: paths, or names inside the archive.
    """

    archive: Path | None
    parts: tuple[str, ...]

    @property
    def npz(self) -> bool:
        """Whether the parts are npz files; otherwise they are pickles."""
        return self.parts[0].endswith(".npz")

    @property
    def files(self) -> list[Path]:
        """The files on the disk."""
        return [self.archive] if self.archive is not None else [Path(part) for part in self.parts]

    def stamps(self) -> dict[str, list[int]]:
        """Returns size in bytes and time of change of each file, which tell whether it is the same as another time."""
        return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in self.files}


def find_source(folder: Path, stored: StoredSet) -> Source | None:
    """Finds the files of a set: the archive of npz files (the only one whose checksum is published) before others.

    Unpacked files may lie in `folder` or in the archive's own folder, `folder/Imagenet32_train_npz` and so on.

    Returns:
        None if there are none at all.

    Raises:
        UserError: Some parts are there and others are missing.
    """
    stem = f"Imagenet32_{stored}"
    names = [f"train_data_batch_{number}" for number in range(1, len(COUNTS["train"]) + 1)]
    names = names if stored == "train" else ["val_data"]
    for suffix, extension in (("_npz", ".npz"), ("", "")):
        archive = folder / f"{stem}{suffix}.zip"
        if archive.is_file():
            return Source(archive, _members(archive, [name + extension for name in names]))
        for place in (folder, folder / f"{stem}{suffix}", folder / stored):
            parts = [place / (name + extension) for name in names]
            missing = [part for part in parts if not part.is_file()]
            if not missing:
                return Source(None, tuple(map(str, parts)))
            if len(missing) < len(parts):
                raise UserError(
                    f"'{missing[0]}' is missing, though other parts of ImageNet 32x32 are there: put all {len(parts)} "
                    "parts into one folder, or the archive as it was downloaded."
                )
    return None


def _members(archive: Path, names: list[str]) -> tuple[str, ...]:
    try:
        with zipfile.ZipFile(archive) as opened:
            inside = {re.sub(r".*/", "", member): member for member in opened.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"'{archive}' is not a readable zip archive ({error}): download it again.") from error
    for name in names:
        if name not in inside:
            raise UserError(f"'{archive}' has no '{name}' in it, which the published archive has: download it again.")
    return tuple(inside[name] for name in names)


def verify(source: Source, advance: Callable[[float], None]) -> None:
    """Compares an archive with the published size and checksum; of other files none are published.

    Args:
        source: What to check.
        advance: Called with each share of the whole that has been done, 1 in all.

    Raises:
        UserError: A difference.
    """
    if source.archive is None or source.archive.name not in ARCHIVES:
        return
    expected, size = ARCHIVES[source.archive.name], source.archive.stat().st_size
    remedy = "download it again, or set verify to false if you mean to use another"
    if size != expected.size:
        raise UserError(f"'{source.archive}' is {size:,} bytes long and the published one {expected.size:,}: {remedy}.")
    digest = hashlib.sha256()
    with source.archive.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk) / size)
    if digest.hexdigest() != expected.sha256:
        raise UserError(f"'{source.archive}' is damaged or not the published one, by its sha256 checksum: {remedy}.")
