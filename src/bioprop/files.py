"""Writing a file so that a reader, or a crash, sees the old one or the new one, and the names of files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


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
        path: where the file is to be; its folder is made if need be.
        mode: as for `open`.
        how: further arguments of `open`.

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
    """A file that notes why a write was refused."""

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
