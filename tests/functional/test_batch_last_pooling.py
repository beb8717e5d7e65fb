"""Pooling of maps with the batch innermost, against that of images."""

import pytest
import torch
from torch import Tensor

from bioprop.functional.batch_last_pooling import pool_batch_last, unpool_batch_last
from bioprop.functional.pooling import Pool, max_pool, unpool_adding, unpool_overwriting
from tests.geometries import POOLS

GEOMETRIES = [pool for pool in [*POOLS, Pool(5, 2, 2), Pool(4, 3, 1)] if pool is not None]
CASES = pytest.mark.parametrize("pool", GEOMETRIES, ids=str)
SIZES = pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 5)], ids=str)


def planes(images: Tensor) -> Tensor:
    return images.permute(1, 2, 3, 0)


@CASES
@SIZES
@pytest.mark.parametrize("ties", [False, True])
def test_pooling_and_its_two_ways_back(pool: Pool, size: tuple[int, int], ties: bool) -> None:
    images = torch.randn(3, 4, *size, dtype=torch.float64)
    images = images.round() if ties else images
    pooled, switches = max_pool(images, pool)
    found, numbers = pool_batch_last(planes(images), pool)
    assert torch.equal(found, planes(pooled))
    assert numbers.dtype is torch.float64
    values = torch.randn_like(pooled)
    for overwrite, way_back in ((False, unpool_adding), (True, unpool_overwriting)):
        back = unpool_batch_last(planes(values), numbers, pool, size, overwrite)
        torch.testing.assert_close(back, planes(way_back(values, switches, pool, size)), rtol=1e-14, atol=1e-14)
