"""The reconstruction loss of operators that are not linear in their weights."""

import pytest
import torch
from torch import Tensor, nn

from bioprop.functional.outer_reconstruction import outer_reconstruction_gradient


class Back(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(6, dtype=torch.float64))

    def forward(self, outputs: Tensor, switches: Tensor | None) -> Tensor:
        assert switches is not None
        return torch.tanh(outputs @ self.weight + self.bias)


class Halves:
    """Passes four of six units on, halved; its switches say whose pass it was."""

    def run(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * inputs[:, :4], torch.ones(1)


def test_the_gradient_is_that_of_the_formula() -> None:
    """Written out: ``dL/da = 2/batch (G - x) (1 - G^2)`` with ``G = tanh(a)``."""
    back, inputs, noise = Back(), torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    found = outer_reconstruction_gradient(Halves(), back, inputs, noise)
    noisy = inputs + noise
    outputs = 0.5 * noisy[:, :4]
    guess = torch.tanh(outputs @ back.weight + back.bias).detach()
    slope = 2 / 5 * (guess - noisy) * (1 - guess**2)
    torch.testing.assert_close(found.parameters["weight"], outputs.T @ slope)
    torch.testing.assert_close(found.parameters["bias"], slope.sum(0))
    assert found.loss.item() == pytest.approx(((guess - noisy) ** 2).sum().item() / 5)
    assert found.curvature is None
    assert all(parameter.grad is None for parameter in back.parameters())
