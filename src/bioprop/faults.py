"""The rule that tells mistakes and failures outside the code, which deserve a sentence, from bugs."""

import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from lightning_fabric.utilities.exceptions import MisconfigurationException

from bioprop.errors import UserError

PACKAGE = str(Path(__file__).parent)
LIBRARIES = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})
#: What torch and numpy say where memory is wanting, or would be for sizes that no computer counts in.
NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|[Ss]torage size calculation overflowed|"
    r"integer multiplication overflow|Overflow when unpacking long|array is too big|allowed dimension exceeded"
)
#: What torch says of an operation where deterministic ones are asked for.
UNORDERED = re.compile(r"(\S+) does not have a deterministic implementation")
AMOUNT = re.compile(r"(tried|Tried|Unable) to allocate [\d.]+ \w+")


def as_user_error(error: BaseException) -> UserError | None:
    """Say in one sentence what went wrong outside the code; None for a bug, whose traceback is to be seen.

    The rule goes through the error and its causes, and by where each was raised:

    - A `UserError`, or Lightning's complaint about its configuration, is the sentence.
    - Memory that is wanting is the machine's, whoever asked for it.
    - The operating system's refusals (`OSError`) and missing packages (`ImportError`) are the outside's in the
      constructor of any class that the settings name, the user's own too, and later wherever the code that met them is
      not the user's own: what that opens in the middle of training is known to that alone.
    - Any refusal of a value that Lightning itself raises, with no code of ours or of the user's between it and the
      command line, is about the settings; so is one by a class of another library that is being made from them.
    - Everything else is a bug, of ours or of the user's own class.
    """
    chain = list(_causes(error))
    for each in chain:
        if isinstance(each, UserError):
            return each
    for each in chain:
        if sentence := _sentence(each):
            found = UserError(sentence)
            found.__cause__ = each
            return found
    return None


def refused_by_library(error: BaseException) -> bool:
    """Return whether a library raised an error that was just caught, with nobody else's code in between."""
    _, *between = _frames(error)
    return bool(between) and all(_is_library(frame) for frame in between)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    frames = list(_frames(error))
    being_made = any(_package(frame) == "jsonargparse" for frame in frames)
    own = next((frame for frame in reversed(frames) if not _is_library(frame)), None)
    users = own is not None and not own.f_code.co_filename.startswith(PACKAGE)
    if isinstance(error, MisconfigurationException):
        return text
    if isinstance(error, MemoryError) or (isinstance(error, Exception) and NO_MEMORY.search(str(error))):
        amount = AMOUNT.search(text)
        return (
            f"there is not enough memory ({(amount[0] if amount else text) or 'no amount is known'}): lower the sizes "
            "of the network, data.batch_size, data.image_size or data.limit_train, or take a larger machine"
        )
    if isinstance(error, RuntimeError) and (unordered := UNORDERED.search(text)):
        return (
            f"{unordered[1]} adds up in no defined order here: leave --trainer.deterministic out, or choose a network "
            "without it"
        )
    if isinstance(error, OSError) and (being_made or not users):
        what = f"{error.filename}: {error.strerror}" if error.filename is not None and error.strerror else text
        return f"{what}: check the path and the disk, or choose another"
    if isinstance(error, ImportError) and (being_made or not users) and not (error.name or "").startswith("bioprop"):
        made = next((type(frame.f_locals["self"]).__name__ for frame in reversed(frames) if _is_constructor(frame)), "")
        (first, *_) = [*str(error).strip().splitlines(), "a package"]
        return f"{made or 'something here'} needs what is not installed ({first}): install it, or leave that out"
    if isinstance(error, RuntimeError | ValueError | TypeError | NotImplementedError) and frames:
        by_hand = own is None or own.f_globals.get("__name__") == "bioprop.cli"
        raised_in = _package(frames[-1])
        if by_hand and (raised_in in ("pytorch_lightning", "lightning_fabric") or being_made):
            return text if raised_in != "jsonargparse" else ""
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _frames(error: BaseException) -> Iterator[FrameType]:
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_library(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    return not path.startswith(PACKAGE) and path.startswith(("<", *LIBRARIES))


def _is_constructor(frame: FrameType) -> bool:
    return frame.f_code.co_name == "__init__" and "self" in frame.f_locals
