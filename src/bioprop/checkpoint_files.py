"""Checkpoints on the disk: written whole or not at all, read as plain data and tensors only."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from lightning_fabric.utilities.types import _PATH

from bioprop.errors import UserError
from bioprop.files import replacing


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
