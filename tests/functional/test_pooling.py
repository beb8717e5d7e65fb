"""Max-pooling's switches and its two ways back."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.pooling import (
    Pool,
    fold_windows,
    locate,
    unpool,
    unpool_adding,
)

DISJOINT = [Pool(2, 2), Pool(3, 3), Pool(2, 2, 1), Pool(2, 3)]
OVERLAPPING = [Pool(3, 2, 1), Pool(3, 2), Pool(3, 1, 1), Pool(5, 2, 2)]
SIZES = [(8, 8), (7, 9)]


def overwritten(values: Tensor, switches: Tensor, pool: Pool, size: tuple[int, int]) -> Tensor:
    return unpool(values, locate(switches, pool, overwriting=True), pool, size)


def draw_maps(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64)


def transpose_by_autograd(maps: Tensor, pool: Pool, values: Tensor) -> Tensor:
    leaf = maps.clone().requires_grad_()
    pooled = F.max_pool2d(leaf, pool.kernel_size, pool.stride, pool.padding)
    (transposed,) = torch.autograd.grad(pooled, leaf, values)
    return transposed


@pytest.mark.parametrize("pool", DISJOINT + OVERLAPPING, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_switches_point_at_the_maxima(pool: Pool, size: tuple[int, int]) -> None:
    maps = draw_maps(size)
    pooled, switches = F.max_pool2d(maps, *pool, return_indices=True)
    assert pooled.shape[2:] == switches.shape[2:] == pool.output_size(*size)
    assert torch.equal(pooled, F.max_pool2d(maps, pool.kernel_size, pool.stride, pool.padding))
    assert torch.equal(maps.flatten(2).gather(2, switches.flatten(2)).view_as(pooled), pooled)


@pytest.mark.parametrize("pool", DISJOINT + OVERLAPPING, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_adding_is_the_exact_transpose_of_pooling(pool: Pool, size: tuple[int, int]) -> None:
    """``<P x, y> = <x, P^T y>``, and autograd has the same ``P^T``."""
    maps = draw_maps(size)
    pooled, switches = F.max_pool2d(maps, *pool, return_indices=True)
    values = torch.randn_like(pooled)
    back = unpool_adding(values, switches, pool, size)
    torch.testing.assert_close(back, transpose_by_autograd(maps, pool, values), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close((pooled * values).sum(), (maps * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", [pool for pool in DISJOINT if pool.padding == 0], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_both_ways_back_agree_where_windows_do_not_overlap(pool: Pool, size: tuple[int, int]) -> None:
    pooled, switches = F.max_pool2d(draw_maps(size), *pool, return_indices=True)
    values = torch.randn_like(pooled)
    assert torch.equal(overwritten(values, switches, pool, size), unpool_adding(values, switches, pool, size))


@pytest.mark.parametrize("pool", OVERLAPPING, ids=str)
def test_overwriting_is_not_the_transpose_where_windows_overlap(pool: Pool) -> None:
    maps = draw_maps((8, 8))
    pooled, switches = F.max_pool2d(maps, *pool, return_indices=True)
    values = torch.rand_like(pooled) + 0.5
    transposed = transpose_by_autograd(maps, pool, values)
    back = overwritten(values, switches, pool, (8, 8))
    assert (back - transposed).abs().max() > 0.1
    assert torch.equal(back != 0, transposed != 0)  # the same positions, with another value where windows overlap


def test_overwriting_keeps_the_last_of_the_competing_values() -> None:
    maps = torch.zeros(1, 1, 3, 3)
    maps[0, 0, 1, 1] = 1.0
    _, switches = F.max_pool2d(maps, *Pool(2, 1), return_indices=True)
    values = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]])
    assert overwritten(values, switches, Pool(2, 1), (3, 3))[0, 0, 1, 1].item() == 8.0
    assert unpool_adding(values, switches, Pool(2, 1), (3, 3))[0, 0, 1, 1].item() == 15.0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("pool", DISJOINT + OVERLAPPING, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_folding_equals_scattering(pool: Pool, size: tuple[int, int], layout: torch.memory_format) -> None:
    maps = draw_maps(size).contiguous(memory_format=layout)
    pooled, switches = F.max_pool2d(maps, *pool, return_indices=True)
    values = torch.randn_like(pooled)
    places = torch.zeros(2, 3, size[0] * size[1], dtype=torch.float64)
    expected = places.scatter_add(2, switches.flatten(2), values.flatten(2)).view_as(maps)
    torch.testing.assert_close(unpool_adding(values, switches, pool, size), expected, rtol=1e-14, atol=1e-14)
    folded = fold_windows(values, switches, pool, size)
    torch.testing.assert_close(folded, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("pool", [Pool(3, 2, 1), Pool(2, 2)], ids=str)
def test_the_ways_back_are_of_a_defined_order(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses operations without one in this mode, of which its own ``max_unpool2d`` is one on every device."""
    monkeypatch.setattr(torch._C._nn, "max_unpool2d", None)
    pooled, switches = F.max_pool2d(draw_maps((8, 6)), *pool, return_indices=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(unpool_adding(pooled, switches, pool, (8, 6)), fold_windows(pooled, switches, pool, (8, 6)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way_back", [overwritten, unpool_adding])
def test_ways_back_do_not_depend_on_the_number_of_threads(way_back: Callable[..., Tensor]) -> None:
    """torch's max_unpool2d does, wherever windows overlap and two threads share a map."""
    pool = Pool(3, 2, 1)
    pooled, switches = F.max_pool2d(draw_maps((15, 14)), *pool, return_indices=True)
    alone = way_back(pooled, switches, pool, (15, 14))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(torch.equal(way_back(pooled, switches, pool, (15, 14)), alone) for _ in range(50))
    finally:
        torch.set_num_threads(before)


def test_overwriting_has_the_right_jacobian() -> None:
    """Reverse mode: a value that was overwritten has no influence, so its gradient is zero."""
    pool = Pool(3, 2, 1)
    pooled, switches = F.max_pool2d(draw_maps((8, 8)), *pool, return_indices=True)
    values = torch.randn_like(pooled).requires_grad_()
    maps = overwritten(values, switches, pool, (8, 8))
    (gradient,) = torch.autograd.grad(maps.sum(), values)
    survived = torch.isin(values.detach(), maps.detach())
    assert torch.equal(gradient != 0, survived)
    assert not survived.all()
