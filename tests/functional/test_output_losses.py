"""Losses at the output and their derivatives."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.errors import UserError
from bioprop.functional.output_losses import OUTPUT_LOSSES, OutputLoss, output_loss

BATCH, CLASSES = 5, 7


def draw() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, CLASSES, dtype=torch.float64, requires_grad=True), torch.randint(CLASSES, (BATCH,))


def test_the_losses_are_what_they_are_called() -> None:
    logits, labels = draw()
    squared = sum(
        0.5 * (logits[row, column] - float(column == labels[row])) ** 2
        for row in range(BATCH)
        for column in range(CLASSES)
    )
    torch.testing.assert_close(output_loss("squared_error").mean(logits, labels), squared / BATCH)
    torch.testing.assert_close(output_loss("cross_entropy").mean(logits, labels), F.cross_entropy(logits, labels))


def assert_gradient_belongs_to_the_loss(loss: OutputLoss) -> None:
    """Per sample: the mean's gradient times the batch."""
    logits, labels = draw()
    (gradient,) = torch.autograd.grad(loss.mean(logits, labels), logits)
    torch.testing.assert_close(loss.gradient(logits.detach(), labels), BATCH * gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OUTPUT_LOSSES)
def test_the_gradient_is_that_of_the_loss(name: str) -> None:
    assert_gradient_belongs_to_the_loss(output_loss(name))


@pytest.mark.parametrize("name", OUTPUT_LOSSES)
def test_a_mutated_gradient_is_noticed(name: str) -> None:
    loss = output_loss(name)
    for mutated in (lambda *args: -loss.gradient(*args), lambda *args: loss.gradient(*args) / BATCH):
        with pytest.raises(AssertionError):
            assert_gradient_belongs_to_the_loss(loss._replace(gradient=mutated))


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UserError, match="loss 'hinge' is not known: choose one of cross_entropy, squared_error"):
        output_loss("hinge")
