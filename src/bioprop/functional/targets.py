"""Targets of difference target propagation, as differences ``d^n = t^n - s^n`` from the activations.

The output's is here; the hidden ones, ``d^{n-1} = G^n(s^n + d^n) - G^n(s^n)`` (Lee et al., 2015), are the mirrors'
``difference``.

Working with ``d`` instead of ``t`` keeps the digits that subtracting two nearly equal tensors would lose when the
step ``beta`` is small.
"""

from torch import Tensor

from bioprop.functional.output_losses import CROSS_ENTROPY, OutputLoss


def output_difference(logits: Tensor, labels: Tensor, beta: float, loss: OutputLoss = CROSS_ENTROPY) -> Tensor:
    """``d^N = t^N - s^N = -beta dL/ds^N`` per sample; for cross-entropy ``-beta (softmax(s^N) - onehot(y))``.

    Ernoult et al. (2022); not divided by the batch. Shapes ``[batch, classes]``, ``[batch]`` -> ``[batch, classes]``.
    """
    return -beta * loss.gradient(logits, labels)
