"""Image files: looking at one, decoding many."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress

from bioprop.datamodules.image_listing import Tally
from bioprop.errors import UserError

FILES_PER_TASK, BYTES_PER_TASK, TASKS_PER_THREAD = 64, 2**24, 4


class Form(NamedTuple):
    """The form of every image: (channels, height, width), by resizing or not, and the colour behind it."""

    shape: tuple[int, int, int]
    resize: bool
    background: str


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (UserError, MemoryError):
        raise
    except Exception as error:  # for broken files Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(f"'{path}' cannot be read as an image ({error}): replace or remove it.") from error


def look(path: Path) -> tuple[int, int, int]:
    """Returns (channels, height, width) of an image held upright; 1 channel for grey and black-and-white images.

    Raises:
        UserError: The file cannot be read as an image.
    """
    with _opened(path) as image:
        channels = 1 if _is_grey(image) else 3
        _turn_upright(image)
        return channels, image.height, image.width


def all_grey(paths: Iterable[Path]) -> bool:
    """Says if all images are grey, by their headers, of which none is read after the first that is not.

    Raises:
        UserError: A file cannot be read as an image.
    """
    for path in paths:
        with _opened(path) as image:
            if not _is_grey(image):
                return False
    return True


def _is_grey(image: Image.Image) -> bool:
    return Image.getmodebase(image.mode) == "L"


def decoded(paths: Sequence[Path], form: Form, changed: Tally) -> Iterator[np.ndarray]:
    """Decodes files by threads (Pillow's decoders release the lock), with a progress bar on a terminal.

    Images are turned as their EXIF orientation says, put over the background where they are transparent, converted to
    grey or RGB, and resized bilinearly with antialiasing if the form says so; of several frames the first is taken.
    They come in the order of their files, uint8 [block, channels, height, width]; `changed` counts those changed.

    Raises:
        UserError: A file cannot be read as an image, has more than 8 bits per channel, or has another size and is not
            to be resized.
    """
    size = max(1, min(FILES_PER_TASK, BYTES_PER_TASK // math.prod(form.shape)))

    def load(start: int) -> tuple[np.ndarray, list[list[str]]]:
        images, changes = zip(*(_load(path, form) for path in paths[start : start + size]), strict=True)
        return np.stack(images), list(changes)

    threads, console = _usable_cpus(), Console(stderr=True)
    quiet = getattr(rank_zero_only, "rank", 0) != 0 or not console.is_terminal
    ahead = threads * TASKS_PER_THREAD * size  # images in memory at once
    with ThreadPoolExecutor(threads) as pool, Progress(console=console, transient=True, disable=quiet) as progress:
        for start in progress.track(range(0, len(paths), ahead), description="decoding images"):
            starts = range(start, min(start + ahead, len(paths)), size)
            for first, (images, changes) in zip(starts, pool.map(load, starts), strict=True):
                for path, kinds in zip(paths[first : first + size], changes, strict=True):
                    for kind in kinds:
                        changed.setdefault(kind, []).append(path)
                yield images


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(path: Path, form: Form) -> tuple[np.ndarray, list[str]]:
    """Returns one image as uint8 [channels, height, width], and in which ways it was changed."""
    channels, height, width = form.shape
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):  # others of more than 8 bits are scaled by Pillow
            raise UserError(
                f"'{path}' has more than 8 bits per channel (mode {image.mode}), and which of its values are black and "
                "white is not known: scale it to 8 bits."
            )
        pixels, changes = _convert(image, "L" if channels == 1 else "RGB", form.background)
        if pixels.size != (width, height):
            if not form.resize:
                raise UserError(
                    f"'{path}' is {pixels.width}x{pixels.height} pixels, but the first image is {width}x{height} "
                    "(width x height): set image_size to resize all images, or make them all one size."
                )
            changes.append(f"resized to {width}x{height} pixels")
            pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(pixels).reshape(height, width, channels).transpose(2, 0, 1), changes


def _convert(image: Image.Image, mode: str, background: str) -> tuple[Image.Image, list[str]]:
    """Returns an image upright and opaque in grey ("L") or "RGB", and in which ways it was changed."""
    changes = []
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's, with previews behind the picture
        changes.append("of several frames, of which the first is used")
    if _turn_upright(image):
        changes.append("turned upright as EXIF says")
    if _is_grey(image) != (mode == "L"):
        changes.append("grey, used as RGB" if mode == "RGB" else "coloured, used as grey")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
            changes.append(f"transparent, put over {background}")
    return image.convert(mode), changes


def _turn_upright(image: Image.Image) -> bool:
    """Turns and mirrors an image in place as its EXIF orientation says; returns whether that says anything."""
    image.load()
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        if turned:
            ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # a damaged EXIF record, of which Pillow raises this and that, says nothing
        return False
    return turned
