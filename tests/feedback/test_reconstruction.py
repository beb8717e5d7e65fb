"""The losses of the DRL family and their gradients, against numpy by hand, in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bioprop.feedback.losses import FeedbackGradient
from bioprop.feedback.reconstruction import difference_reconstruction_gradient, plain_reconstruction_gradient

BATCH, FEATURES, UNITS, SIGMA, DECAY = 7, 5, 4, 0.3, 0.2
Array = np.ndarray


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def tanh_by_hand(Q: Array, c: Array, values: Array) -> tuple[Array, Array]:
    """``tanh(Q z + c)`` and its slope."""
    mapped = np.tanh(values @ Q.T + c)
    return mapped, 1 - mapped**2


def linear_by_hand(Q: Array, c: Array, values: Array) -> tuple[Array, Array]:
    mapped = values @ Q.T + c
    return mapped, np.ones_like(mapped)


MAPS = {
    "linear": (linear_by_hand, lambda values: values),
    "tanh": (tanh_by_hand, torch.tanh),
}
on_both_maps = pytest.mark.parametrize("kind", list(MAPS))


class Drawn:
    """Weights, both arguments, and the noise, as numpy arrays; the same as tensors by `gradient`."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.Q, self.c = rng.normal(size=(UNITS, FEATURES)), rng.normal(size=UNITS)
        self.noisy, self.clean = rng.normal(size=(2, BATCH, FEATURES))
        self.noise = SIGMA * rng.normal(size=(BATCH, UNITS))

    def squares(self) -> float:
        """``|Q|^2 + |c|^2``: the authors' weight decay is the optimizer's, which spares no bias."""
        return float((self.Q**2).sum() + (self.c**2).sum())

    def gradient(self, kind: str, loss: Callable[..., FeedbackGradient]) -> FeedbackGradient:
        weight, bias = torch.tensor(self.Q, requires_grad=True), torch.tensor(self.c, requires_grad=True)

        def decode(values: Tensor) -> Tensor:
            return MAPS[kind][1](values @ weight.t() + bias)

        return loss(decode, {"weight": weight, "bias": bias})


def difference_loss(drawn: Drawn, sigma: float = SIGMA, sign: float = 1.0) -> Callable[..., FeedbackGradient]:
    noisy, clean, noise = (torch.tensor(part) for part in (drawn.noisy, drawn.clean, sign * drawn.noise))
    return lambda decode, parameters: difference_reconstruction_gradient(
        decode, parameters, noisy, clean, noise, sigma, DECAY
    )


def difference_by_hand(drawn: Drawn, kind: str) -> tuple[float, Array, Array]:
    """Loss and gradients of ``1/sigma^2 mean |g(z) + s - g(z_clean) - (s + sigma eps)|^2 + decay (|Q|^2 + |c|^2)``."""
    g = MAPS[kind][0]
    (noisy, noisy_slope), (clean, clean_slope) = (g(drawn.Q, drawn.c, z) for z in (drawn.noisy, drawn.clean))
    state = np.arange(BATCH * UNITS).reshape(BATCH, UNITS) / 10  # any activations: they cancel
    residual = (noisy + state - clean) - (state + drawn.noise)
    loss = sum(float(row @ row) for row in residual) / BATCH / SIGMA**2 + DECAY * drawn.squares()
    scale = 2 / BATCH / SIGMA**2
    of_noisy, of_clean = scale * residual * noisy_slope, scale * residual * clean_slope
    weight = of_noisy.T @ drawn.noisy - of_clean.T @ drawn.clean + 2 * DECAY * drawn.Q
    return loss, weight, of_noisy.sum(0) - of_clean.sum(0) + 2 * DECAY * drawn.c


def matches(found: FeedbackGradient, expected: tuple[float, Array, Array]) -> bool:
    loss, weight, bias = expected
    return (
        np.isclose(found.loss.item(), loss, rtol=1e-12)
        and np.allclose(found.parameters["weight"].numpy(), weight, rtol=1e-10, atol=1e-11)
        and np.allclose(found.parameters["bias"].numpy(), bias, rtol=1e-10, atol=1e-11)
    )


@on_both_maps
def test_difference_reconstruction_by_hand(kind: str, rng: np.random.Generator) -> None:
    drawn = Drawn(rng)
    found = drawn.gradient(kind, difference_loss(drawn))
    assert matches(found, difference_by_hand(drawn, kind))
    assert found.curvature is None
    assert not found.loss.requires_grad


@on_both_maps
@pytest.mark.parametrize(
    "mutated",
    [
        lambda drawn: difference_loss(drawn, sign=-1.0),
        lambda drawn: difference_loss(drawn, sigma=1.0),
        lambda drawn: plain_loss(drawn),
    ],
    ids=["noise flipped", "not over sigma squared", "difference dropped"],
)
def test_another_loss_is_noticed(
    mutated: Callable[[Drawn], Callable[..., FeedbackGradient]], kind: str, rng: np.random.Generator
) -> None:
    drawn = Drawn(rng)
    assert not matches(drawn.gradient(kind, mutated(drawn)), difference_by_hand(drawn, kind))


def test_a_linear_maps_bias_cancels_and_decays(rng: np.random.Generator) -> None:
    drawn = Drawn(rng)
    found = drawn.gradient("linear", difference_loss(drawn)).parameters["bias"]
    torch.testing.assert_close(found, torch.tensor(2 * DECAY * drawn.c))


def plain_loss(drawn: Drawn) -> Callable[..., FeedbackGradient]:
    noisy, states = torch.tensor(drawn.noisy), torch.tensor(drawn.noise)
    return lambda decode, parameters: plain_reconstruction_gradient(decode, parameters, noisy, states, DECAY)


@on_both_maps
def test_plain_reconstruction_by_hand(kind: str, rng: np.random.Generator) -> None:
    drawn = Drawn(rng)
    mapped, slope = MAPS[kind][0](drawn.Q, drawn.c, drawn.noisy)
    residual = mapped - drawn.noise
    error = 2 / BATCH * residual * slope
    expected = (
        (residual**2).sum() / BATCH + DECAY * drawn.squares(),
        error.T @ drawn.noisy + 2 * DECAY * drawn.Q,
        error.sum(0) + 2 * DECAY * drawn.c,
    )
    assert matches(drawn.gradient(kind, plain_loss(drawn)), expected)


def test_units_in_maps_are_summed_too(rng: np.random.Generator) -> None:
    """Activations of conv stages count like those of linear ones."""
    drawn = Drawn(rng)
    noise = torch.tensor(drawn.noise)
    weight = torch.tensor(drawn.Q, requires_grad=True)
    arguments = (torch.tensor(drawn.noisy), torch.tensor(drawn.clean))
    flat = difference_reconstruction_gradient(
        lambda z: z @ weight.t(), {"weight": weight}, *arguments, noise, SIGMA, DECAY
    )
    maps = difference_reconstruction_gradient(
        lambda z: (z @ weight.t()).view(-1, 1, 2, 2),
        {"weight": weight},
        *arguments,
        noise.view(-1, 1, 2, 2),
        SIGMA,
        DECAY,
    )
    torch.testing.assert_close(maps.parameters["weight"], flat.parameters["weight"])
    torch.testing.assert_close(maps.loss, flat.loss)


def test_the_minimiser_is_the_damped_pseudo_inverse(rng: np.random.Generator) -> None:
    """At ``Q = J^T (J J^T + decay I)^-1`` the gradient over white noise vanishes, and nowhere near."""
    J = rng.normal(size=(FEATURES, UNITS))
    eps = np.sqrt(UNITS) * np.concatenate([np.eye(UNITS), -np.eye(UNITS)])  # exactly white: mean eps eps^T = I
    best = J.T @ np.linalg.inv(J @ J.T + DECAY * np.eye(FEATURES))
    for Q, expected in ((best, True), (np.linalg.pinv(J), False), (J.T, False)):
        weight = torch.tensor(Q, requires_grad=True)
        found = difference_reconstruction_gradient(
            lambda z, weight=weight: z @ weight.t(),
            {"weight": weight},
            torch.tensor(SIGMA * eps @ J.T),
            torch.zeros(len(eps), FEATURES, dtype=torch.float64),
            torch.tensor(SIGMA * eps),
            SIGMA,
            DECAY,
        )
        assert (found.parameters["weight"].abs().max().item() < 1e-12) == expected
