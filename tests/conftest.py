"""What all tests share: one seed for each test, one thread, small batches of images."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.testing.helpers import from_one_seed
from bioprop.testing.processes import ProcessPool, shared_pool

Batch = tuple[Tensor, Tensor]


def pytest_configure() -> None:
    # Tensors this small gain nothing from threads and on a busy machine lose: two took 62 s for what one does in 5.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with from_one_seed():
        yield


@pytest.fixture
def processes(request: pytest.FixtureRequest) -> ProcessPool:
    """Two processes that train together."""
    return shared_pool(request)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Give a function that draws white-noise images and labels, from a seed of their own."""

    def make(
        count: int = 8,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, *image_shape, generator=generator, dtype=torch.float64)
        return images.to(dtype), torch.randint(classes, (count,), generator=generator)

    return make


@pytest.fixture
def make_smooth_batch() -> Callable[..., Batch]:
    """Give a function that draws smooth images, which are as correlated across pixels as photographs are."""

    def make(
        count: int = 64,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        channels, *size = image_shape
        coarse = torch.randn(count, channels, 6, 6, generator=generator, dtype=torch.float64)
        images = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
        images = (images - images.mean()) / images.std()
        return images.to(dtype), torch.randint(classes, (count,), generator=generator)

    return make
