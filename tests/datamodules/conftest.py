import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteImages = Callable[..., Path]


@pytest.fixture(autouse=True)
def level_of_python() -> Iterator[None]:
    """Logs as where no command has run in the process, which would leave all notes shown."""
    root = logging.getLogger("bioprop")
    before = root.level
    root.setLevel(logging.NOTSET)
    yield
    root.setLevel(before)


@pytest.fixture
def write_images(tmp_path: Path) -> WriteImages:
    """Writes `counts[class]` random images for one split of a folder and returns the folder."""

    def write(
        split: str, counts: dict[str, int], size=(6, 5), mode: str = "RGB", extension: str = "png", seed: int = 0
    ):
        rng = np.random.default_rng((seed, sum(split.encode())))
        for name, count in counts.items():
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
                image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                image.save(folder / f"{number:03d}.{extension}")
        return tmp_path / "images"

    return write


@pytest.fixture
def folder(write_images: WriteImages) -> Path:
    """A folder of 10 ants and 20 cats to train on, and 3 and 4 to test on."""
    write_images("train", {"cat": 20, "ant": 10})
    return write_images("test", {"ant": 3, "cat": 4})
