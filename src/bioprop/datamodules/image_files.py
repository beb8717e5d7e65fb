"""Image files: looking at one, decoding many."""

import math
import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bioprop.datamodules.image_listing import Tally
from bioprop.errors import UserError

FILES_PER_TASK, BYTES_PER_TASK = 64, 2**24
#: Blocks for each thread that are decoded or wait for whoever takes them.
TASKS_AHEAD = 4

COLOURED = "coloured, used as grey"
#: Ways in which images were changed on the way, by their places; those that were not are missing.
Notes = dict[int, list[str]]


class Form(NamedTuple):
    """The form of every image: (channels, height, width), by resizing or not, and the colour behind it."""

    shape: tuple[int, int, int]
    resize: bool
    background: str


def look(path: Path) -> tuple[int, int, int]:
    """Returns (channels, height, width) of an image held upright; 1 channel for grey and black-and-white images.

    Raises:
        UserError: The file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            channels = 1 if _is_grey(image) else 3
            _turn_upright(image)
            return channels, image.height, image.width
    except Exception as error:  # as in _load
        raise unreadable(path, error) from error


def all_grey(paths: Iterable[Path]) -> bool:
    """Says if all images are grey, by their headers, of which none is read after the first that is not.

    Files that cannot be read are left to whoever decodes them.
    """
    for path in paths:
        try:
            with Image.open(path) as image:
                if not _is_grey(image):
                    return False
        except Exception:  # as in _load
            continue
    return True


def _is_grey(image: Image.Image) -> bool:
    return Image.getmodebase(image.mode) == "L"


def check_background(background: str) -> None:
    """Makes sure that a colour is one.

    Raises:
        UserError: Pillow does not know it, or it is transparent itself.
    """
    try:
        opaque = len(ImageColor.getrgb(background)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise UserError(f"background is '{background}', which is no colour: choose a name such as white or '#808080'.")


def check_memory(count: int, shape: tuple[int, int, int]) -> None:
    """Compares what images take with the memory that the machine has.

    Raises:
        UserError: They do not fit.
    """
    needed = count * math.prod(shape)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise _too_large(count, shape, f"more than the {memory / 1e9:.0f} GB of this machine")


def _too_large(count: int, shape: tuple[int, int, int], reason: str) -> UserError:
    channels, height, width = shape
    return UserError(
        f"{count} image(s) of {height}x{width} pixels and {channels} channel(s) take "
        f"{count * math.prod(shape) / 1e9:,.0f} GB of memory, {reason}: choose a smaller image_size, or fewer images "
        "by limit_train, limit_val and limit_test."
    )


def decode(paths: list[Path], form: Form, found: Tally | None = None) -> Tensor:
    """Decodes files into memory; see `decoded`.

    Args:
        paths: The files, at least one.
        form: The form to bring them to.
        found: Count of the images that were changed on the way, added to.

    Returns:
        uint8 [len(paths), channels, height, width].

    Raises:
        UserError: A file cannot be used, or there is too little memory for all.
    """
    try:
        images = np.empty((len(paths), *form.shape), dtype=np.uint8)
    except (MemoryError, ValueError) as error:  # the latter where the size does not fit a number of 64 bits
        raise _too_large(len(paths), form.shape, "which cannot be had") from error
    start = 0
    quiet = getattr(rank_zero_only, "rank", 0) != 0
    with closing(decoded(paths, form, quiet)) as blocks:
        for block, notes in blocks:
            images[start : start + len(block)] = block
            start += len(block)
            if found is not None:
                for place, kinds in notes.items():
                    for kind in kinds:
                        found.add(kind, paths[place])
    return torch.from_numpy(images)


def decoded(paths: Sequence[Path], form: Form, quiet: bool = False) -> Generator[tuple[np.ndarray, Notes], None, None]:
    """Decodes files, a block at a time, by threads (Pillow's decoders release the lock).

    Images are turned as their EXIF orientation says, put over the background where they are transparent, converted to
    grey or RGB, and resized bilinearly with antialiasing if the form says so; of several frames the first is taken.

    Args:
        paths: The files.
        form: The form to bring them to.
        quiet: Show no progress bar on a terminal, where there is one otherwise.

    Yields:
        The images in the order of their files, uint8 [block, channels, height, width], and the notes on them.

    Raises:
        UserError: A file cannot be read as an image, has more than 8 bits per channel, or has another size and is not
            to be resized.
    """
    size = max(1, min(FILES_PER_TASK, BYTES_PER_TASK // math.prod(form.shape)))

    def work(start: int) -> tuple[np.ndarray, Notes]:
        block, notes = paths[start : start + size], Notes()
        images = np.empty((len(block), *form.shape), dtype=np.uint8)
        for place, path in enumerate(block):
            changes: list[str] = []
            images[place] = _load(path, form, changes)
            if changes:
                notes[start + place] = changes
        return images, notes

    console, pool = Console(stderr=True), ThreadPoolExecutor(usable_cpus())
    waiting: deque[Future[tuple[np.ndarray, Notes]]] = deque()
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("decoding images", total=len(paths))
        try:
            for start in range(0, len(paths), size):
                waiting.append(pool.submit(work, start))
                if len(waiting) > TASKS_AHEAD * usable_cpus():
                    progress.advance(task, size)
                    yield waiting.popleft().result()
            while waiting:
                progress.advance(task, size)
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def usable_cpus() -> int:
    """Number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(path: Path, form: Form, changes: list[str]) -> np.ndarray:
    """Returns one image as uint8 [channels, height, width]."""
    channels, height, width = form.shape
    try:
        with Image.open(path) as image:
            mode, deep = image.mode, _has_more_than_8_bits(image)
            pixels = image if deep else _convert(image, "L" if channels == 1 else "RGB", form, changes)
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others for broken files
    except Exception as error:
        raise unreadable(path, error) from error
    if deep:
        raise UserError(
            f"'{path}' has more than 8 bits per channel (mode {mode}), and which of its values are black and white is "
            "not known: scale it to 8 bits."
        )
    if pixels.size != (width, height):
        if not form.resize:
            raise UserError(
                f"'{path}' is {pixels.width}x{pixels.height} pixels, but the first image is {width}x{height} (width x "
                "height): set image_size to resize all images, or make them all one size."
            )
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(pixels).reshape(height, width, channels).transpose(2, 0, 1)


def _has_more_than_8_bits(image: Image.Image) -> bool:
    """Says if a file just opened has, by the arguments of its decoder: Pillow keeps the high byte of 16-bit colours."""
    if image.mode.startswith(("I", "F")):
        return True
    for codec, _, _, arguments in getattr(image, "tile", ()):
        values = arguments if isinstance(arguments, tuple) else (arguments,)
        if codec == "SGI16" or any(re.search(r";16[BLN]", value) for value in values if isinstance(value, str)):
            return True
        if codec.startswith("ppm") and any(value > 255 for value in values if isinstance(value, int)):
            return True
    return False


def _convert(image: Image.Image, mode: str, form: Form, changes: list[str]) -> Image.Image:
    """Returns an image upright and opaque in grey ("L") or "RGB", as all are to be."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's, with previews behind the picture
        changes.append("of several frames, of which the first is used")
    if _turn_upright(image):
        changes.append("turned upright as EXIF says")
    if _is_grey(image) != (mode == "L"):
        changes.append("grey, used as RGB" if mode == "RGB" else COLOURED)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, form.background), image)
            changes.append(f"transparent, put over {form.background}")
    return image.convert(mode)


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


def unreadable(path: Path, error: Exception) -> UserError:
    """Returns the sentence on a file that cannot be read as an image."""
    return UserError(f"'{path}' cannot be read as an image ({error}): replace or remove it.")
