"""The target of the output."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.targets import output_difference

BATCH, CLASSES, BETA = 5, 7, 0.3
Rule = Callable[[Tensor, Tensor, float], Tensor]


def assert_steps_against_the_gradient_per_sample(rule: Rule) -> None:
    """``t^N - s^N = -beta dL/ds^N`` per sample: the mean loss's gradient times the batch."""
    logits = torch.randn(BATCH, CLASSES, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, (BATCH,))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    torch.testing.assert_close(rule(logits.detach(), labels, BETA), -BETA * BATCH * gradient, rtol=1e-12, atol=1e-14)


def test_the_output_target_steps_against_the_gradient() -> None:
    assert_steps_against_the_gradient_per_sample(output_difference)


@pytest.mark.parametrize(
    "mutated",
    [
        lambda logits, labels, beta: -output_difference(logits, labels, beta),
        lambda logits, labels, beta: output_difference(logits, labels, beta) / len(logits),
        lambda logits, labels, beta: torch.zeros_like(logits),
    ],
    ids=["sign flipped", "divided by the batch", "target dropped"],
)
def test_a_mutated_output_target_is_noticed(mutated: Rule) -> None:
    with pytest.raises(AssertionError):
        assert_steps_against_the_gradient_per_sample(mutated)


def test_the_output_target_keeps_the_dtype() -> None:
    assert output_difference(torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 2]), 1.0).dtype == torch.float64
    assert output_difference(torch.randn(2, 3), torch.tensor([0, 2]), 1.0).dtype == torch.float32
