"""One run in a folder at a time."""

import logging
import os
import socket
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK, HOLDER = ".run.lock", ".run.holder"


class FolderLock:
    """Holds a folder for this process; the system lets go of it when the process ends, however that happens.

    Over NFS it is a lock of the server's, which other machines respect. File systems that know no locks are said so.
    """

    def __init__(self) -> None:
        self._lock: FileLock | None = None
        self._holder = Path()

    def take(self, folder: Path) -> str | None:
        """Hold the folder of a run's checkpoints until `release`, and with it the run's own where that is the parent.

        Args:
            folder: folder of the checkpoints, made if need be.

        Returns:
            A sentence that says why this process cannot have it: it cannot be written, or another run is in it.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            return f"no checkpoint can be written in {folder} ({error.strerror}): choose another folder"
        locked = folder.parent if folder.name == "checkpoints" else folder
        own = f"process {os.getpid()} on {socket.gethostname()}"
        lock = FileLock(locked / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            holder = _read(locked / HOLDER)
            if holder.startswith(f"{own},"):
                return None
            return f"a run is writing into {folder} already ({holder}): wait until it ends, or stop it"
        except (OSError, NotImplementedError) as error:
            logger.warning("%s cannot be locked (%s): start no second run in it", locked, error)
            return None
        self.release()
        self._lock, self._holder = lock, locked / HOLDER
        self._holder.write_text(f"{own}, since {datetime.now():%Y-%m-%d %H:%M}")
        return None

    def release(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._holder.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None


def _read(holder: Path) -> str:
    try:
        return holder.read_text() or "another process"
    except OSError:  # it is about to write it
        return "another process"
