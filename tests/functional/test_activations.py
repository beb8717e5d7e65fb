"""The activations of the feedback path and their slopes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.errors import UserError
from bioprop.functional.activations import ACTIVATIONS, find_activation

ActivationFunction = Callable[[Tensor], Tensor]
BEFORE_ACTIVATION = torch.tensor([-6.0, -2.5, -1.0, -0.3, -0.01, 0.01, 0.3, 1.0, 2.5, 6.0], dtype=torch.float64)


def slope(function: ActivationFunction, where: Tensor) -> Tensor:
    leaf = where.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return gradient


def assert_slopes_match(rho: ActivationFunction, phi: ActivationFunction) -> None:
    """``phi'(rho(a)) = rho'(a)``."""
    torch.testing.assert_close(
        slope(phi, rho(BEFORE_ACTIVATION)), slope(rho, BEFORE_ACTIVATION), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_exact_activation_has_the_forward_slope_at_the_output(name: str) -> None:
    assert_slopes_match(find_activation(name).rho, find_activation(name).phi)


@pytest.mark.parametrize(("name", "expected"), [("elu", F.elu), ("tanh", torch.tanh)])
def test_the_papers_activation_is_the_forward_one_and_has_another_slope(
    name: str, expected: ActivationFunction
) -> None:
    phi = find_activation(name, "paper").phi
    assert torch.equal(phi(BEFORE_ACTIVATION), expected(BEFORE_ACTIVATION))
    with pytest.raises(AssertionError):
        assert_slopes_match(find_activation(name).rho, phi)


@pytest.mark.parametrize("name", ["elu", "tanh"])
def test_a_flipped_sign_in_the_exact_activation_is_noticed(name: str) -> None:
    mutated = {
        "elu": lambda y: y.clamp_min(0) + y.clamp_max(0) - y.clamp_max(0) ** 2 / 2,
        "tanh": lambda y: y + y**3 / 3,
    }
    with pytest.raises(AssertionError):
        assert_slopes_match(find_activation(name).rho, mutated[name])


@pytest.mark.parametrize(
    ("name", "beyond", "limit"),
    [("elu", [-1.0, -1.5, -40.0], -0.5), ("tanh", [1.0, 1.5, 40.0], 2 / 3), ("tanh", [-1.0, -1.5, -40.0], -2 / 3)],
)
def test_the_exact_activation_is_constant_beyond_the_forward_range(
    name: str, beyond: list[float], limit: float
) -> None:
    phi = find_activation(name).phi
    values = torch.tensor(beyond, dtype=torch.float64)
    torch.testing.assert_close(phi(values), torch.full_like(values, limit), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["elu", "tanh"])
def test_the_exact_activation_is_continuous_at_the_ends_of_its_pieces(name: str) -> None:
    phi = find_activation(name).phi
    ends = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(phi(ends - 1e-12), phi(ends + 1e-12), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("mirror", ["paper", "exact"])
def test_feedback_activations_keep_zero(name: str, mirror: str) -> None:
    """Unpooled maps are mostly zeros, before or after the activation: both orders must agree on them."""
    assert find_activation(name, mirror).phi(torch.zeros(1)).item() == 0.0


def test_an_unknown_activation_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"'gelu' is not known: choose one of elu, relu, tanh, leaky_relu, identity"):
        find_activation("gelu")


def test_an_unknown_form_of_mirror_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match="'mine' is not known: choose one of paper, exact"):
        find_activation("elu", "mine")
