"""Losses at the output, each with its derivative with respect to the logits of one sample."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.errors import UserError

OutputLossName = Literal["cross_entropy", "squared_error"]


class OutputLoss(NamedTuple):
    """A loss of logits ``[batch, classes]`` and labels ``[batch]``.

    Attributes:
        mean: its mean over the batch, a scalar.
        gradient: ``dL/ds^N`` per sample, ``[batch, classes]``: not divided by the batch.
    """

    mean: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def cross_entropy_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """``softmax(s^N) - onehot(y)``."""
    return torch.softmax(logits, dim=1) - _onehot(logits, labels)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """``mean_batch 1/2 |s^N - onehot(y)|^2``."""
    return 0.5 * F.mse_loss(logits, _onehot(logits, labels), reduction="sum") / len(labels)


def squared_error_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """``s^N - onehot(y)``."""
    return logits - _onehot(logits, labels)


def _onehot(logits: Tensor, labels: Tensor) -> Tensor:
    return F.one_hot(labels, logits.shape[1]).to(logits.dtype)


CROSS_ENTROPY = OutputLoss(F.cross_entropy, cross_entropy_gradient)
OUTPUT_LOSSES: dict[str, OutputLoss] = {
    "cross_entropy": CROSS_ENTROPY,
    "squared_error": OutputLoss(squared_error, squared_error_gradient),
}


def output_loss(name: str) -> OutputLoss:
    """Return a loss by its name.

    Raises:
        UserError: if there is no loss of that name.
    """
    if name not in OUTPUT_LOSSES:
        raise UserError(f"loss {name!r} is not known: choose one of {', '.join(OUTPUT_LOSSES)}")
    return OUTPUT_LOSSES[name]
