"""One run in a folder at a time."""

import logging
import os
import socket
from datetime import datetime
from pathlib import Path

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
        """Hold the folder until `release`.

        Args:
            folder: made if need be.

        Returns:
            Which other process holds it, as ``process 12 on host, since 2026-01-31 12:00``; None where this one does.
        """
        folder.mkdir(parents=True, exist_ok=True)
        own = f"process {os.getpid()} on {socket.gethostname()}"
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            holder = _read(folder / HOLDER)
            return None if holder.startswith(f"{own},") else holder
        except (OSError, NotImplementedError) as error:
            logger.warning("%s cannot be locked (%s): start no second run in it", folder, error)
            return None
        self.release()
        self._lock = lock
        self._holder = folder / HOLDER
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
