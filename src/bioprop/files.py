"""Files: written so that a reader, or a crash, sees the old one or the new one; checkpoints read as data alone."""

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.utilities.types import _PATH

from bioprop.errors import UserError


def readable(name: str | Path) -> str:
    """Return a file's name in characters that every output takes: a byte that is not UTF-8 by its number."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


class WriteError(OSError):
    """A file could not be written: no space, no permission, a limit; what was there before is as it was."""


@contextmanager
def replacing(path: str | Path, mode: str = "wb", **how: Any) -> Iterator[IO[Any]]:
    """Open a file to be written; it takes its name once it is complete and on the disk.

    Until then it lies beside the final place, named ``<name>.part``, so that the step from one to the other is a
    rename within a folder. What a killed process left under that name is overwritten by the next attempt.

    Args:
        path: final path of the file; its folder is made if need be.
        mode: mode of `open`.
        how: further keyword arguments of `open`.

    Yields:
        The file, to be written in the body.

    Raises:
        WriteError: if the operating system refuses any part of it. Other exceptions of the body pass.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = part.open(mode, **how)
    except OSError as error:
        raise _write_error(error, path) from error
    refusals: list[OSError] = []
    try:
        with file:
            yield _Watched(file, refusals)  # type: ignore[misc]
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # writers that are no Python (torch.save) turn the refusal of a write into an exception of their own
        refusal = error if isinstance(error, OSError) else next(iter(refusals), None)
        if refusal is not None:
            raise _write_error(refusal, path) from error
        raise


class _Watched:
    """A file that keeps the errors by which its writes were refused."""

    def __init__(self, file: IO[Any], refusals: list[OSError]) -> None:
        self._file, self._refusals = file, refusals

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self._refusals.append(error)
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _write_error(error: OSError, path: Path) -> WriteError:
    return WriteError(error.errno, error.strerror or str(error), str(path))


def _sync_folder(folder: Path) -> None:
    """Put the rename itself on the disk, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


# -- checkpoints -----------------------------------------------------------------------------------------------------


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, each written beside its final place and renamed once it is on the disk.

    Lightning 2.6.6 writes to the system's temporary folder and moves the file from there, which is a copy wherever that
    folder is another file system: a full disk, or a kill, leaves half a file in place of the previous checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint; places that are no local path (``s3://...``) are left to Lightning.

        Raises:
            WriteError: if the disk is full, or the write is refused otherwise; the previous file is as it was.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as file:
            torch.save(checkpoint, file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint as plain data and tensors, on the CPU; code in it is not run.

    Raises:
        UserError: if the file cannot be read as one, saying in what way, and what else to go on from.
    """
    try:
        return _read(Path(path))
    except UserError as error:
        raise UserError(f"{path} cannot be read as a checkpoint: {error}{_way_out(Path(path))}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        # torch does not look at the archive's checksums: a flipped bit would be another weight
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError("it holds more than numbers and text, none of which was run") from error
    except Exception as error:  # bytes that are no checkpoint raise nearly anything
        raise UserError(f"it is {_what_it_is(path)}") from error
    if damaged:
        raise UserError(f"it is damaged, in {damaged}")
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError("it holds no state_dict")
    return checkpoint


def _what_it_is(path: Path) -> str:
    if not path.exists():
        return "not there"
    if path.is_dir():
        return "a folder"
    if path.stat().st_size == 0:
        return "empty"
    with path.open("rb") as file:
        starts_as_one = file.read(2) == b"PK"
    return "damaged: a part of it is missing" if starts_as_one else "damaged, or another kind of file"


def _way_out(path: Path) -> str:
    """Name the other checkpoints of the run that the damaged one belongs to."""
    others = sorted(path.parent.glob("*.ckpt"), key=lambda other: -other.stat().st_mtime)
    if path.parent.name != "checkpoints":
        return ""
    for other in others:
        if other != path:
            try:
                _read(other)
            except UserError:
                continue
            return f"; --ckpt_path {other} can be read"
    return "; its run has no other: start a new one without --ckpt_path"
