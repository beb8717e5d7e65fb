"""How fixed feedback weights are drawn."""

import pytest
import torch
from torch import Tensor

from bioprop.errors import UserError
from bioprop.functional.fixed_weights import FixedWeightName, draw_fixed_weight


def drawn(kind: FixedWeightName, shape: tuple[int, ...], scale: float = 1e-3, sparsity: float = 0.9) -> Tensor:
    weight = torch.full(shape, torch.nan, dtype=torch.float64)
    if len(shape) == 4:  # as the weights of conv stages lie in memory
        weight = weight.contiguous(memory_format=torch.channels_last)
    draw_fixed_weight(weight, kind, scale, sparsity)
    return weight


def test_uniform_weights_fill_their_range() -> None:
    weight = drawn("uniform", (200, 300))
    assert weight.abs().max() <= 1e-3
    assert weight.abs().max() > 0.999e-3
    assert weight.std().item() == pytest.approx(1e-3 / 3**0.5, rel=0.02)


def test_gaussian_weights_have_their_standard_deviation() -> None:
    weight = drawn("gaussian", (200, 300))
    assert weight.std().item() == pytest.approx(1e-3, rel=0.02)
    assert weight.abs().max() > 3e-3


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (8, 3, 5, 5)])
def test_orthogonal_weights_are_orthogonal(shape: tuple[int, ...]) -> None:
    matrix = drawn("orthogonal", shape, scale=2.0).flatten(1)
    short = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    torch.testing.assert_close(short @ short.T, 4.0 * torch.eye(len(short), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(40, 30), (40, 3, 5, 5)])
def test_sparse_weights_leave_as_many_for_each_unit_below(shape: tuple[int, ...]) -> None:
    columns = drawn("sparse", shape, sparsity=0.75).flatten(1)
    assert torch.equal((columns == 0).sum(0), torch.full((columns.shape[1],), 30))
    assert (columns == 0).sum(1).unique().numel() > 1  # chosen at random
    assert 0 < columns.abs().max() <= 1e-3


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="feedback_init 'zeros' is not known: choose one of uniform, gaussian"):
        drawn("zeros", (2, 2))
