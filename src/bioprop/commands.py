"""Around every command: output that cannot break it, one sentence for a mistake, and the exit status.

Nothing heavy is imported here: Ctrl-C is looked after from the first moment on.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from bioprop.errors import UserError

#: What shells take for a process that Ctrl-C ended.
INTERRUPTED = 128 + signal.SIGINT
STREAMS = {"stdout": 1, "stderr": 2}


def conduct(command: Callable[[], int | None]) -> NoReturn:
    """Run a command to its end, and that of the process.

    Args:
        command: returns the exit status, None for 0.

    Raises:
        SystemExit: with the command's status; 2 after one sentence on a user's mistake, 1 where another process is
            lost, 130 on Ctrl-C, 143 on SIGTERM and 129 on SIGHUP.
    """
    secure_output()
    try:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # where another process started this one
        status = command()
    except UserError as error:
        distributed = sys.modules.get("bioprop.distributed")  # if nobody has imported it, this process is alone
        if distributed is not None:
            distributed.wait_for_the_first()
        sys.stderr.write(f"bioprop: error: {error}\n")
        sys.exit(1 if distributed is not None and isinstance(error, distributed.LostProcessError) else 2)
    except (KeyboardInterrupt, SystemExit) as left:  # Lightning turns the former into the latter, with status 1
        if isinstance(left, KeyboardInterrupt) or isinstance(left.__context__, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        if not left.code:  # --help, --print_config: what was printed is all there was to do
            sys.stdout.flush()
            refusal = getattr(getattr(sys.stdout.buffer, "raw", sys.stdout.buffer), "refusal", None)
            sys.exit(2 if refusal is not None and refusal.errno != errno.EPIPE else 0)
        raise
    sys.exit(status)


@contextmanager
def ctrl_c_withheld() -> Iterator[None]:
    """Start processes to which no Ctrl-C gets: one that imports would die of it with a traceback. This one notes it."""
    if sys.platform == "win32":  # which has no such mask
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def secure_output() -> None:
    """Make standard output and error take whatever is written, so that no run ends for what it says.

    A character that their encoding lacks is written by its number. A stream that is closed from the start leads
    nowhere. So does, from there on, one that refuses a write (the reader of a pipe has gone, the disk is full, the
    terminal was closed), which standard error says once. Streams that somebody else put in place stay.
    """
    for descriptor in (0, *STREAMS.values()):
        try:
            os.fstat(descriptor)
        except OSError:  # the next file that is opened would get the number, and with it what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, descriptor in STREAMS.items():
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            secured = unbreakable(descriptor, stream)
            setattr(sys, name, secured)
            setattr(sys, f"__{name}__", secured)


def unbreakable(descriptor: int, like: Any = None) -> io.TextIOWrapper:
    """A text stream whose writes never raise an exception.

    Args:
        descriptor: descriptor of the open file, which stays open when the stream is closed.
        like: a text stream whose encoding and buffering are taken over.
    """
    errors, unbuffered = getattr(like, "errors", "strict"), getattr(like, "write_through", False)
    file = _Unbreakable(descriptor, "wb", closefd=False)
    return io.TextIOWrapper(
        file if unbuffered else io.BufferedWriter(file),
        encoding=getattr(like, "encoding", "utf-8"),
        errors="backslashreplace" if errors in ("strict", "surrogateescape") else errors,
        line_buffering=getattr(like, "line_buffering", True),
        write_through=unbuffered,
    )


class _Unbreakable(io.FileIO):
    """A file that leads nowhere once it has refused a write."""

    refusal: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.refusal = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self.fileno() != STREAMS["stderr"]:
                with suppress(OSError):
                    os.write(STREAMS["stderr"], f"bioprop: output is lost from here on: {error.strerror}\n".encode())
            return memoryview(content).nbytes
