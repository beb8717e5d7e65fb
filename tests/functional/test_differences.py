"""Differences that are computed without subtracting two nearly equal values."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.activations import ACTIVATIONS
from bioprop.functional.differences import (
    activation_difference,
    standardize,
    standardize_difference,
    tanh_difference,
)

Difference = Callable[[Tensor, Tensor], Tensor]


def plain_standardize(values: Tensor) -> Tensor:
    columns = []
    for column in values.T:
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / (len(column) - 1)
        columns.append((column - mean) / (variance**0.5 + 1e-12))
    return torch.stack(columns, 1)


def draw(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(9, 4, dtype=dtype), torch.randn(9, 4, dtype=dtype)


def test_standardized_values_are_those_of_the_formula() -> None:
    values, _ = draw()
    torch.testing.assert_close(standardize(values), plain_standardize(values), rtol=1e-12, atol=1e-13)
    silent = torch.full((5, 2), 0.25, dtype=torch.float64)
    assert standardize(silent).abs().max() == 0
    torch.testing.assert_close(standardize(standardize(values)), standardize(values), rtol=1e-10, atol=1e-11)


def assert_equals_the_subtraction(difference: Difference, function: Callable[[Tensor], Tensor]) -> None:
    """For steps as large as the values, where subtracting loses nothing."""
    values, step = draw()
    torch.testing.assert_close(
        difference(values, step), function(values + step) - function(values), rtol=1e-10, atol=1e-11
    )


def assert_keeps_its_digits(difference: Difference) -> None:
    """A step of a hundred-millionth, in float32, against float64: to 1e-5 of its size."""
    values, step = draw(torch.float32)
    small = difference(values, 1e-8 * step).double()
    expected = difference(values.double(), 1e-8 * step.double())
    assert (small - expected).norm() < 1e-5 * expected.norm()


FORMULAS = {"tanh": (tanh_difference, torch.tanh), "standardize": (standardize_difference, plain_standardize)}


@pytest.mark.parametrize(("difference", "function"), FORMULAS.values(), ids=FORMULAS)
def test_a_difference_equals_the_subtraction(difference: Difference, function: Callable[[Tensor], Tensor]) -> None:
    assert_equals_the_subtraction(difference, function)
    assert_keeps_its_digits(difference)


def test_the_subtraction_itself_has_no_digits_left() -> None:
    for function in (torch.tanh, standardize):
        with pytest.raises(AssertionError):
            assert_keeps_its_digits(lambda values, step, function=function: function(values + step) - function(values))


def test_mutated_differences_are_noticed() -> None:
    for mutated in (lambda a, d: torch.tanh(d) * (1 + torch.tanh(a) * torch.tanh(a + d)), lambda a, d: torch.tanh(d)):
        with pytest.raises(AssertionError):
            assert_equals_the_subtraction(mutated, torch.tanh)
    centred_only = lambda x, d: (d - d.mean(0)) / (x + d).std(0)  # noqa: E731
    with pytest.raises(AssertionError):
        assert_equals_the_subtraction(centred_only, plain_standardize)


def test_a_silent_unit_is_standardised_by_its_step_alone() -> None:
    silent, step = torch.zeros(6, 1, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(standardize_difference(silent, step), plain_standardize(step), rtol=1e-9, atol=1e-9)
    assert standardize_difference(silent, silent).abs().max() == 0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_has_a_difference(name: str) -> None:
    plain = {"elu": F.elu, "relu": F.relu, "tanh": torch.tanh, "leaky_relu": F.leaky_relu, "identity": lambda x: x}
    assert_equals_the_subtraction(lambda values, step: activation_difference(name, values, step), plain[name])
