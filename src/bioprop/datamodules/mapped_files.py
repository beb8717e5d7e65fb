"""Files of pixels that are made once and then mapped into memory by every process and every run."""

import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from pytorch_lightning.utilities import rank_zero_only

logger = logging.getLogger(__name__)

Opened = TypeVar("Opened")


def made_once(lock: Path, ready: Callable[[], Opened | None], make: Callable[[], object], waiting: str) -> Opened:
    """Opens files, after making them where that has not been done yet.

    Of several processes that come here at once, one makes the files and the others wait. The lock is the operating
    system's and ends with the process that holds it.

    Args:
        lock: File of the lock; its folder is made if need be.
        ready: Function that opens the files, and returns None where they are missing or not whole.
        make: Function that makes them, in such a way that an interrupted attempt leaves nothing that `ready` opens.
        waiting: What another process is doing, the beginning of a sentence for the log.

    Raises:
        OSError: The folder cannot be written to, or what was made there cannot be opened.
        NotImplementedError: The folder lies in a network file system without locks.
    """
    if (opened := ready()) is not None:
        return opened
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, waiting):
        if (opened := ready()) is None:
            make()
            opened = ready()
    if opened is None:
        raise OSError(f"what was written into '{lock.parent}' cannot be read back")
    return opened


def _locked(path: Path, waiting: str) -> AbstractContextManager[object]:
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        rank_zero_only(logger.info)("%s: waiting for it.", waiting)
        return lock.acquire()


def lack_of_room(folder: Path, need: int) -> str | None:
    """Returns what is missing for `need` bytes in a folder, to stand behind a subject; None where there is room."""
    if (free := shutil.disk_usage(folder).free) >= need:
        return None
    return f"needs {need / 1e9:.1f} GB in '{folder}', where {free / 1e9:.1f} GB are free"


def write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    """Writes the beginning of a .npy file of bytes, which is as long for any number of images."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
