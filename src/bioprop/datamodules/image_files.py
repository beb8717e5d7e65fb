"""Image files: looking at one, decoding many."""

import math
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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

FILES_PER_TASK = 64
MAX_THREADS = min(8, os.cpu_count() or 1)
# Decoding smaller files is mostly Python's own work, for whose lock threads only compete.
THREADED_FILE_BYTES = 8192


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
        raise _unreadable(path, error) from error


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
    """Decodes files, large ones by threads (Pillow's decoders release the lock), with a progress bar on a terminal.

    Images are turned as their EXIF orientation says, put over the background where they are transparent, converted to
    grey or RGB, and resized bilinearly with antialiasing if the form says so; of several frames the first is taken.

    Args:
        paths: The files, at least one.
        form: The form to bring them to.
        found: Count of the images that were changed on the way, added to.

    Returns:
        uint8 [len(paths), channels, height, width].

    Raises:
        UserError: A file cannot be read as an image, has more than 8 bits per channel, or has another size and is not
            to be resized; or there is too little memory for all.
    """
    try:
        images = np.empty((len(paths), *form.shape), dtype=np.uint8)
    except (MemoryError, ValueError) as error:  # the latter where the size does not fit a number of 64 bits
        raise _too_large(len(paths), form.shape, "which cannot be had") from error

    def work(start: int) -> tuple[int, Tally]:
        block, changed = paths[start : start + FILES_PER_TASK], Tally()
        for place, path in enumerate(block, start):
            images[place] = _load(path, form, changed)
        return len(block), changed

    console = Console(stderr=True)
    threads = MAX_THREADS if paths[0].stat().st_size >= THREADED_FILE_BYTES else 1
    quiet = not console.is_terminal or getattr(rank_zero_only, "rank", 0) != 0
    with Progress(console=console, transient=True, disable=quiet) as progress, ThreadPoolExecutor(threads) as pool:
        task = progress.add_task("decoding images", total=len(paths))
        for done, changed in pool.map(work, range(0, len(paths), FILES_PER_TASK)):
            progress.advance(task, done)
            if found is not None:
                for kind, names in changed.items():
                    found.add(kind, *names)
    return torch.from_numpy(images)


def _load(path: Path, form: Form, changed: Tally) -> np.ndarray:
    """Returns one image as uint8 [channels, height, width]."""
    channels, height, width = form.shape
    try:
        with Image.open(path) as image:
            mode, deep = image.mode, _has_more_than_8_bits(image)
            pixels = image if deep else _convert(image, "L" if channels == 1 else "RGB", form, path, changed)
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others for broken files
    except Exception as error:
        raise _unreadable(path, error) from error
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


def _convert(image: Image.Image, mode: str, form: Form, path: Path, changed: Tally) -> Image.Image:
    """Returns an image upright and opaque in grey ("L") or "RGB", as all are to be."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's, with previews behind the picture
        changed.add("of several frames, of which the first is used", path)
    if _turn_upright(image):
        changed.add("turned upright as EXIF says", path)
    if _is_grey(image) != (mode == "L"):
        changed.add("grey, used as RGB" if mode == "RGB" else "coloured, used as grey", path)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, form.background), image)
            changed.add(f"transparent, put over {form.background}", path)
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


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"'{path}' cannot be read as an image ({error}): replace or remove it.")
