"""Backward matrices: how they are drawn, scaled, tied to signs, and mirrored."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.angles import angle_degrees
from bioprop.functional.backward_matrices import (
    draw_like,
    mirror_estimate,
    root_mean_square,
    sign_concordant,
    with_norm_of,
)

SHAPES = pytest.mark.parametrize("shape", [(7, 5), (6, 2, 3, 4)], ids=["linear", "conv"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@SHAPES
def test_the_size_of_an_entry_is_its_root_mean_square(shape: tuple[int, ...]) -> None:
    weight = (3 + torch.randn(shape, dtype=torch.float64)).requires_grad_()
    found = root_mean_square(weight)
    assert float(found) == pytest.approx(np.sqrt(np.mean(weight.detach().numpy() ** 2)), rel=1e-12)
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_drawn_entries_are_gaussian_of_the_given_size(dtype: torch.dtype) -> None:
    drawn = draw_like(torch.zeros(200, 100, dtype=dtype), 0.25, seeded(3))
    assert drawn.shape == (200, 100)
    assert drawn.dtype == dtype
    values = drawn.double() / 0.25
    assert values.mean().abs() < 0.03
    assert float(values.square().mean()) == pytest.approx(1.0, abs=0.03)
    assert float(values.pow(4).mean()) == pytest.approx(3.0, abs=0.2)


@SHAPES
def test_the_draw_is_a_function_of_the_generator_alone(shape: tuple[int, ...]) -> None:
    first = draw_like(torch.zeros(shape), torch.tensor(0.5), seeded(1))
    torch.rand(5)
    assert torch.equal(draw_like(torch.ones(shape), torch.tensor(0.5), seeded(1)), first)
    assert not torch.equal(draw_like(torch.zeros(shape), torch.tensor(0.5), seeded(2)), first)
    torch.manual_seed(4)
    unguided = draw_like(torch.zeros(shape), 1.0)
    torch.manual_seed(4)
    assert torch.equal(draw_like(torch.zeros(shape), 1.0), unguided)


@SHAPES
def test_sign_concordant_has_the_signs_of_one_and_the_magnitudes_of_the_other(shape: tuple[int, ...]) -> None:
    weight, magnitude = torch.randn(shape), torch.randn(shape)
    found = sign_concordant(weight, magnitude).numpy()
    assert np.array_equal(np.sign(found), np.sign(weight.numpy()))
    assert np.array_equal(np.abs(found), np.abs(magnitude.numpy()))
    uniform = sign_concordant(weight, torch.tensor(-0.3))
    assert torch.equal(uniform, torch.where(weight > 0, 0.3, -0.3))


def test_where_the_weight_is_zero_no_error_passes() -> None:
    assert sign_concordant(torch.tensor([0.0, -2.0]), torch.tensor(3.0)).tolist() == [0.0, -3.0]


@SHAPES
def test_scaling_to_a_norm_keeps_the_direction(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    scaled = with_norm_of(matrix, torch.tensor(2.5, dtype=torch.float64))
    assert float(scaled.norm()) == pytest.approx(2.5, rel=1e-12)
    assert float(angle_degrees(scaled, matrix)) < 1e-9


def test_a_zero_matrix_stays_zero() -> None:
    assert torch.equal(with_norm_of(torch.zeros(3, 2), torch.tensor(2.0)), torch.zeros(3, 2))


@SHAPES
def test_the_mirror_is_the_mean_outer_product_of_response_and_noise(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    found = mirror_estimate(weight, 9, torch.relu, seeded(5))
    rows = weight.numpy().reshape(shape[0], -1)
    noise = torch.randn(9, rows.shape[1], dtype=torch.float64, generator=seeded(5)).numpy()
    expected = np.zeros_like(rows)
    for x in noise:
        expected += np.outer(np.maximum(rows @ x, 0), x) / 9
    torch.testing.assert_close(found, torch.from_numpy(expected.reshape(shape)))


@SHAPES
@pytest.mark.parametrize(("activation", "slope"), [(F.relu, 0.5), (lambda x: x, 1.0)], ids=["relu", "identity"])
def test_the_mirrors_expectation_is_the_weight_times_the_mean_slope(
    shape: tuple[int, ...], activation: Callable[[Tensor], Tensor], slope: float
) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    found = mirror_estimate(weight, 40_000, activation, seeded(6))
    assert (found - slope * weight).norm() < 0.05 * slope * weight.norm()


def test_the_mirror_draws_new_noise_as_its_generator_moves_on() -> None:
    weight, generator = torch.randn(4, 3), seeded(7)
    first, second = (mirror_estimate(weight, 5, torch.relu, generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(mirror_estimate(weight, 5, torch.relu, seeded(7)), first)
