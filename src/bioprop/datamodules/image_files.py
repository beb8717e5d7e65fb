"""Image files in class folders: listing, looking at one, decoding many."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from bioprop.datamodules.images import BLOCK, Images
from bioprop.errors import UserError

FILES_PER_TASK = 64
MAX_THREADS = min(8, os.cpu_count() or 1)
# Decoding smaller files is mostly Python's own work, for whose lock threads only compete: on 2 cores, two threads were
# 1.8 times faster on 400x400 JPEG files and 1.5 times slower on CIFAR-10's (1 kB each).
THREADED_FILE_BYTES = 8192


def list_class_folders(folder: Path) -> dict[str, list[Path]]:
    """Lists the images of every class of one split, `folder/<class>/*`, both in alphabetical order.

    Hidden files and folders, and files that are not named like images, are passed over.

    Raises:
        UserError: The folder is missing, has no class folders, or a class has no images.
    """
    if not folder.is_dir():
        raise UserError(f"folder '{folder}' does not exist: images are expected in '{folder}/<class>/'.")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"folder '{folder}' has no class folders: images are expected in '{folder}/<class>/'.")
    files = {name: _list_images(folder / name) for name in classes}
    for name, images in files.items():
        if not images:
            raise UserError(
                f"class folder '{folder / name}' has no images: put some there ({', '.join(IMG_EXTENSIONS)}) or remove "
                "the folder."
            )
    return files


def _list_images(folder: Path) -> list[Path]:
    names = (entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    return [folder / name for name in sorted(names) if has_file_allowed_extension(name, IMG_EXTENSIONS)]


def look(path: Path) -> tuple[int, int, int]:
    """Returns (channels, height, width) of an image from its header; 1 channel for grey and black-and-white images.

    Raises:
        UserError: The file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return 1 if Image.getmodebase(image.mode) == "L" else 3, image.height, image.width
    except Exception as error:  # as in _load
        raise _unreadable(path, error) from error


def decode(paths: list[Path], shape: tuple[int, int, int], resize: bool) -> Tensor:
    """Decodes files, large ones by threads (Pillow's decoders release the lock), with a progress bar on a terminal.

    Args:
        paths: The files, at least one.
        shape: (channels, height, width) of all images; other colours are converted to grey or RGB.
        resize: Resize images of another size, bilinearly with antialiasing; otherwise they are refused.

    Returns:
        uint8 [len(paths), channels, height, width].

    Raises:
        UserError: A file cannot be read as an image, has more than 8 bits per channel, or has another size.
    """
    images = np.empty((len(paths), *shape), dtype=np.uint8)

    def work(start: int) -> int:
        block = paths[start : start + FILES_PER_TASK]
        for place, path in enumerate(block, start):
            images[place] = _load(path, shape, resize)
        return len(block)

    console = Console(stderr=True)
    threads = MAX_THREADS if paths[0].stat().st_size >= THREADED_FILE_BYTES else 1
    quiet = not console.is_terminal or getattr(rank_zero_only, "rank", 0) != 0
    with Progress(console=console, transient=True, disable=quiet) as progress, ThreadPoolExecutor(threads) as pool:
        task = progress.add_task("decoding images", total=len(paths))
        for done in pool.map(work, range(0, len(paths), FILES_PER_TASK)):
            progress.advance(task, done)
    return torch.from_numpy(images)


def _load(path: Path, shape: tuple[int, int, int], resize: bool) -> np.ndarray:
    """Returns one image as uint8 [channels, height, width]."""
    channels, height, width = shape
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = image.convert("L" if channels == 1 else "RGB")
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others for broken files
    except Exception as error:
        raise _unreadable(path, error) from error
    if mode.startswith(("I", "F")):
        raise UserError(f"'{path}' has more than 8 bits per pixel (mode {mode}): convert it to an 8-bit image.")
    if pixels.size != (width, height):
        if not resize:
            raise UserError(
                f"'{path}' is {pixels.width}x{pixels.height} pixels, but the first image is {width}x{height} (width x "
                "height): set image_size to resize all images, or make them all one size."
            )
        pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(pixels).reshape(height, width, channels).transpose(2, 0, 1)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"'{path}' cannot be read as an image ({error}): replace or remove it.")


def digests(images: Images) -> list[bytes]:
    """Returns a fingerprint of the pixels of each image: equal for equal images, and else different."""
    return [
        hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        for block in torch.split(torch.arange(len(images)), BLOCK)
        for image in images.index_select(0, block).numpy()
    ]
